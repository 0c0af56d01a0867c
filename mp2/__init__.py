"""mp2: steer a frozen Chinese encoder to a new task with 32 examples, without gradients.

An implementation of the method of Tianxiang Sun, Zhengfu He, Qin Zhu, Xipeng Qiu and Xuanjing Huang:
"Multitask Pre-training of Modular Prompt for Chinese Few-Shot Learning", ACL 2023,
https://aclanthology.org/2023.acl-long.625. "The paper", its sections, equations and tables, in this package's
comments are that one.
"""

__version__ = "0.1.0"
