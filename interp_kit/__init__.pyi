from .catalogue import find_model as find_model
from .catalogue import load_scenario as load_scenario
from .decisions import decide as decide
from .loading import load_model as load_model
from .loading import load_models as load_models
from .passes import shared_passes as shared_passes
from .prompts import encode as encode
from .prompts import encode_scenario as encode_scenario
