"""Lenses: a look inside a model beyond numbers per head. What an answer came from (relevance,
saliency, occlusion), how well attention tells it (agreement), and which features heads carry
(dictionaries).
"""
