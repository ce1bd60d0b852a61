"""Networks: encoders, decoders, the memory module, and pretrained backbones."""

from pmm_fast.models.backbones import BACKBONES
from pmm_fast.models.blocks import Features
from pmm_fast.models.memory import MemoryFusion, MemoryOutput, MemoryWriter, SemanticMemory
from pmm_fast.models.segmentor import ARCHITECTURES, HEADS, Output, Segmentor, build_model
from pmm_fast.models.weights import load_backbone

__all__ = [
    "ARCHITECTURES",
    "BACKBONES",
    "HEADS",
    "Features",
    "MemoryFusion",
    "MemoryOutput",
    "MemoryWriter",
    "Output",
    "Segmentor",
    "SemanticMemory",
    "build_model",
    "load_backbone",
]
