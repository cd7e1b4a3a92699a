"""What the launch of a kernel depends on."""

import torch


def device_limits(device):
    """(lanes of a warp, multiprocessors) of a GPU."""
    if device.type != "cuda":   # the CPU, with TRITON_INTERPRET=1
        return 32, 1
    properties = torch.cuda.get_device_properties(device)
    return properties.warp_size, properties.multi_processor_count
