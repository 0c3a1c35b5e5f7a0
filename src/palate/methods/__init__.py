"""One file per method: the paper's equations, pure loss functions, and a frozen dataclass ``METHOD``.

The module's name is the method's name; ``my_package.my_method`` works wherever ``ppo`` does.
"""
