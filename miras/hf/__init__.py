"""Hugging Face: importing this registers the model type "miras" with AutoConfig, AutoModel and AutoModelForCausalLM."""

from miras.hf.cache import MirasCache as MirasCache
from miras.hf.configuration_miras import MirasConfig as MirasConfig
from miras.hf.modeling_miras import MirasForCausalLM as MirasForCausalLM
from miras.hf.modeling_miras import MirasModel as MirasModel
