"On networks: graphs, surgery, models, files, checkpoints"
