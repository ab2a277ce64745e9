"""What a trained model is worth: bits per byte at any context length, and the text it writes."""

from miras.evaluate.loading import load_model as load_model
from miras.evaluate.perplexity import mean_loss as mean_loss
from miras.evaluate.text import Utf8Streamer as Utf8Streamer
from miras.evaluate.text import generate as generate
