"""Products of many rows on the tensor cores of sm_90a: `wgmma`, the tensor memory accelerator and clusters."""
