import torch

# The networks here are tiny: a second thread costs more than it brings.
torch.set_num_threads(1)

# Its import registers a device with torch for the whole process.
collect_ignore = ["support/toy_device.py"]
