"""What follows runs while they are made: the protocol; TensorBoard, MLflow, Weights & Biases."""

from mp2.runs.loggers.logger import LOGGERS, Logger, RunStart, create_loggers

__all__ = ["LOGGERS", "Logger", "RunStart", "create_loggers"]
