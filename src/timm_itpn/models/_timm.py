"""The names of timm that are private or not exported from `timm.models`; no other file imports them."""
from timm.models._features import FeatureGetterNet as FeatureGetterNet
from timm.models._features import feature_take_indices as feature_take_indices
from timm.models._hub import generate_readme as generate_readme
from timm.models._hub import save_config_for_hf as save_config_for_hf
from timm.models._input import update_model_input_size as update_model_input_size
