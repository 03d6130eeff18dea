"""The lab of virtual machines: hosts with kernels of their own. Standard library alone, as labkit."""
