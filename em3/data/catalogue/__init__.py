"""A made-up catalogue whose click probabilities are known: pictures, titles, users and their clicks.

``make`` writes it in the general layout, the one that users' own data has, so everything that reads data reads it too.
"""

from .writing import make

__all__ = ["make"]
