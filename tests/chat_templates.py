"""Conversations, and templates of the styles in use, with the constructs of the originals."""
# ruff: noqa: E501 - templates are written in long lines

from __future__ import annotations

USER = [{"role": "user", "content": "Who are you? <&>\"'é"}]
TALK = [
    {"role": "system", "content": "  Be brief.\n"},
    {"role": "user", "content": " Hello "},
    {"role": "assistant", "content": "Hi!\n"},
    {"role": "user", "content": "Bye 🙂"},
]
TOOLS = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "w", "arguments": {"city": "Zürich <3"}}}],
    },
    {"role": "tool", "name": "w", "content": "sunny"},
]
THOUGHT = [*TALK[:2], {"role": "assistant", "content": "Hi!", "thinking": "a greeting"}, TALK[3]]
PARTS = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
CONVERSATIONS = {"user": USER, "talk": TALK, "tools": TOOLS, "thought": THOUGHT, "parts": PARTS}
TEMPLATES = {
    "chatml": "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + (message['content'] or '')|string"
    " + '<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "llama_2": "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = "
    "messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception("
    "'Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if loop.index0 == 0 and "
    "system_message != false %}{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' "
    "+ content | string | trim + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + content | string | trim + ' ' "
    "+ eos_token }}{% endif %}{% endfor %}",
    "llama_3": "{{- bos_token }}\n{%- if not date_string is defined %}\n    {%- if strftime_now is defined %}\n"
    "        {%- set date_string = strftime_now('%d %b %Y') %}\n    {%- else %}\n        {%- set date_string = '26 Jul 2024' %}\n"
    "    {%- endif %}\n{%- endif %}\n{%- if messages[0]['role'] == 'system' %}\n    {%- set system_message = "
    "messages[0]['content']|trim %}\n    {%- set messages = messages[1:] %}\n{%- else %}\n    {%- set system_message = '' %}\n"
    "{%- endif %}\n{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}\n{{- 'Today Date: ' + date_string + '\\n\\n' }}\n"
    "{{- system_message }}\n{{- '<|eot_id|>' }}\n{%- for message in messages %}\n    {%- if not (message.role == 'tool' or "
    "'tool_calls' in message) %}\n        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ "
    "message['content'] | string | trim + '<|eot_id|>' }}\n    {%- elif 'tool_calls' in message %}\n        {{- message.tool_calls[0]"
    ".function | tojson }}\n    {%- else %}\n        {{- message.content | tojson }}\n    {%- endif %}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n{%- endif %}\n",
    "mistral": "{%- set ns = namespace(index=0, last=none) %}\n{%- for message in messages %}\n    {%- if message.role == 'user' %}\n"
    "        {%- set ns.index = ns.index + 1 %}\n        {%- set ns.last = loop.index0 %}\n    {%- elif message.role not in "
    "['assistant', 'system', 'tool'] %}\n        {{- raise_exception('Only user, assistant and tool roles: ' + message.role) }}\n"
    "    {%- endif %}\n{%- endfor %}\n{{- bos_token }}{{ ns.index }}{{ ns.last }}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% endfor %}",
    "gemma": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = "
    "message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\\n' + message['content'] | string | trim + '<end_of_turn>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}",
    "qwen": "{%- if tools %}\n    {{- '# Tools' }}{{ tools | tojson }}\n{%- else %}\n    {%- if messages[0].role == 'system' %}\n"
    "        {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}\n    {%- endif %}\n{%- endif %}\n"
    "{%- for message in messages[::-1] %}\n    {%- set index = (messages|length - 1) - loop.index0 %}\n    {{- index }}"
    "{%- if message.content is string %}{{- message.content.split('</think>')[-1].lstrip('\\n') }}{%- endif %}\n"
    "    {%- if message.tool_calls %}\n        {%- for tool_call in message.tool_calls %}\n            {{- '<tool_call>\\n' }}"
    "{{- tool_call.function.arguments | tojson }}{{- tool_call.function | tojson(indent=2) }}\n        {%- endfor %}\n    {%- endif %}\n"
    "    {%- if message.reasoning_content is string %}{{- '<think>' + message.reasoning_content + '</think>' }}{%- endif %}\n"
    "{%- endfor %}\n",
    "generation": "{% for message in messages %}\n{{ message.role }}: \n{% if message.role == 'assistant' %}\n    {% generation %}\n"
    "{{ message.content }}{% set x = 1 %}\n    {% endgeneration %}\n{% else %}\n{{ message.content }}\n{% endif %}{{ x is defined }}\n"
    "{% endfor %}\n",
    "loop_controls": "{% for message in messages %}{% if message.role == 'system' %}{% continue %}{% endif %}{% if loop.index > 3 %}"
    "{% break %}{% endif %}{{ message.content }}|{% endfor %}",
    "parts": "{% for message in messages %}{{ message.role }}{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "{% endfor %}",
    "macros": "{% macro turn(message, mark='>') -%}\n  {{ mark }}{{ message.role|upper }} {{ caller(message) if caller else '' }}\n"
    "{%- endmacro %}\n{% for message in messages %}\n{% call(it) turn(message, mark='#') %}{{ it.content }}{% endcall %}\n{% endfor %}\n",
    "whitespace": "  {% for m in messages %}  \n   {# a note #}\n  {{ m.role }}  \n  {%+ if loop.last %} end {% endif %}  \n\n{% endfor %}\n\n",
    "filters": "{{ messages | map(attribute='role') | join(', ') }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
    "{{ dict(a=1, b=[1.5, none, true]) | tojson(sort_keys=true, separators=(',', ':')) }}{{ messages[0].content | default('x') }}"
    "{{ ['a', 'b'] | tojson }}{{ messages[0].items() | list }}{{ messages[-1]['role'] ~ 1 ~ none }}{{ undefined_name }}",
    "thinking": "{% for m in messages %}{{ m.role }}{{ m.thinking }}{{ m.reasoning_content }}{{ m.reasoning is defined }}{% endfor %}",
}  # fmt: skip
