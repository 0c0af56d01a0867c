"""mp2: tune a frozen language model for a new task from 32 examples, without gradients."""

__version__ = "0.1.0"
