"""Running factored: modules that hold factors instead of the matrices that they stand for."""

from tensorllm.runtime.swap import Placement, install

__all__ = ["Placement", "install"]
