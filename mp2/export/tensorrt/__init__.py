"""TensorRT plans of an engine folder: typed graphs, profiles, builder, keyed and verified files."""

from mp2.engine.tensorrt.profiles import Profile, TaskShapes

__all__ = ["Profile", "TaskShapes"]
