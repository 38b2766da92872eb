"""Synthetic word crops: words, faces, letters, scenes, and how a camera degrades them."""

from lemma_fast.training.synthesis.render import Renderer, renderer, synthesize

__all__ = ["Renderer", "renderer", "synthesize"]
