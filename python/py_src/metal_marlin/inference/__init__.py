"""Running models in the package's own engine."""

from metal_marlin.inference.pipeline import Completion, MarlinPipeline, TextStream

__all__ = ["Completion", "MarlinPipeline", "TextStream"]
