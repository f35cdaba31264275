"""Drop-ins for code written for other RWKV-7 kernels: `fla` and `official`."""
