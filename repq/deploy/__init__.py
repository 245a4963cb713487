"Deployment: the integer network and what is written of it"
