"""Kernels for Hopper (sm_90) in Triton's Gluon dialect: warp-specialised, fed by TMA, on wgmma.

They meet the same contract as the portable kernels (`kernels/attention.py`), which take what these
do not. `kernels/README.md` draws their pipelines.
"""
