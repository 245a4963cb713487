"Deployed models in files: the name under which users import the chapters below"
from repq.deploy.deployed import *
