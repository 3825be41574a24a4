"""Files that `export --as diffusers` copies beside the weights. They import torch, diffusers and
sentencepiece alone: whoever loads the folder has no `pretrain`."""
