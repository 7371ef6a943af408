"""Metal Marlin on more than one machine, by Ray.

:mod:`metal_marlin.ray.serve` serves replicas of the OpenAI API, and :mod:`metal_marlin.ray.quantize` quantises a checkpoint
on many nodes. ``python -m metal_marlin.ray serve|quantize`` starts either. Both need ``pip install "metal_marlin[ray]"`` on every
node, and neither needs torch.
"""
