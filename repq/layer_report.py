"Layer by layer: the name under which users import the chapters below"
from repq.deploy.layer_report import *
