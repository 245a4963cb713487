"ONNX: the name under which users import the chapters below"
from repq.deploy.export import *
