"""Chat templates by mergekit's names, in Jinja as transformers applies them, written from the formats' descriptions."""

from collections import Counter
from collections.abc import Mapping

from parallel.errors import InputError, one_of

AUTO = "auto"
_EACH = "{% for message in messages %}"
_END = "{% endfor %}"
_ASK = "{% if add_generation_prompt %}"

TEMPLATES: dict[str, str] = {
    "alpaca": (
        _EACH + "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
        "{% elif message['role'] == 'user' %}{{ '### Instruction:\n' + message['content'] + '\n\n' }}"
        "{% else %}{{ '### Response:\n' + message['content'] + eos_token + '\n\n' }}{% endif %}"
        + _END
        + _ASK
        + "{{ '### Response:\n' }}{% endif %}"
    ),
    "chatml": (
        _EACH + "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}" + _END + _ASK + ""
        "{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "exaone": (
        _EACH + "{{ '[|' + message['role'] + '|]' + message['content'] }}"
        "{{ '\n' if message['role'] == 'user' else '[|endofturn|]\n' }}"
        + _END
        + _ASK
        + "{{ '[|assistant|]' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}" + _EACH + "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
        "{{ message['content'] | trim }}{{ '<|eot_id|>' }}"
        + _END
        + _ASK
        + "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}"
        + _EACH
        + "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
        "{% elif message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
        "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}" + _END
    ),
}


def chat_template(wanted: str, of_models: Mapping[str, str | None]) -> str | None:
    """Return the template that a recipe asks for: a name, `auto` (what most models have) or Jinja itself.

    Args:
        of_models: each model's own, if it has one.

    Raises:
        InputError: neither a name nor Jinja.
    """
    if wanted == AUTO:
        found = Counter(template for template in of_models.values() if template)
        return found.most_common(1)[0][0] if found else None
    if wanted in TEMPLATES:
        return TEMPLATES[wanted]
    if "{%" in wanted or "{{" in wanted:
        return wanted
    raise InputError(f"{one_of('chat_template', wanted, (AUTO, *TEMPLATES))}; or a template in Jinja")
