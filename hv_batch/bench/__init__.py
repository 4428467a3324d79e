"""Measurements behind `hv-batch bench`: the speed of the engine and of the job on the current machine."""
