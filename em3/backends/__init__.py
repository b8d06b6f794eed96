"""The implementations behind the operations, one package a backend and in it one module an operation.

``em3.ops._dispatch`` holds the ordered lists and says what a module has to provide.
"""
