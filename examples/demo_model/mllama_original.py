"""The published meaning of `intermediate_layers_indices`, put back into current transformers.

The Llama 3.2 Vision weights were trained with index i meaning the INPUT of local encoder layer i, and
transformers 4.45 to 4.54.1 ran them so. transformers 4.57.6 takes the OUTPUT of layer i. The demo model
follows the published meaning: whoever runs it through transformers calls `patch()` first.
"""

from transformers.modeling_outputs import BaseModelOutput
from transformers.models.mllama import modeling_mllama

UNPATCHED = modeling_mllama.MllamaVisionEncoder.forward


def original_forward(self, hidden_states, attention_mask=None) -> BaseModelOutput:
    """Run the encoder layers and keep the input of each of them, then the last output, as hidden states."""
    states = ()
    for layer in self.layers:
        states += (hidden_states,)
        hidden_states = layer(hidden_state=hidden_states, attention_mask=attention_mask)
    return BaseModelOutput(last_hidden_state=hidden_states, hidden_states=(*states, hidden_states))


def patch(on: bool = True) -> None:
    """Switch the vision encoder to the published meaning, or with `on=False` back to the library's own."""
    modeling_mllama.MllamaVisionEncoder.forward = original_forward if on else UNPATCHED
