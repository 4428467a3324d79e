"""`hv-batch bench`: how fast the parts of hv_batch are on the machine that is there."""
