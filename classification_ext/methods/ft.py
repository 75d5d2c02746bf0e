"""Fine-tuning on the retained images: what is not rehearsed may fade (Warnecke et al., 2108.11577)."""

from classification_ext.methods.base import METHODS, Method, Step

METHODS.register(Method("ft", Step.ordinary_loss, over="retain"))
