import re
import time

import pytest
from markupsafe import Markup

from llm_jax import chat
from llm_jax.chat import render
from llm_jax.errors import InputError
from llm_jax.tokenizers import byte_tokenizer

CHATML = """
{%- for message in messages %}
    {%- if loop.first and message['role'] != 'system' %}
        {{- '<|im_start|>system\nBe brief.<|im_end|>\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
LLAMA_3 = """{% set rest = messages %}
{% if not tools is defined or tools is not none or documents is not none %}no tools here{% endif %}
{% if date_string is not defined %}{% set date_string = strftime_now("%d %b %Y") %}{% endif %}
{% for message in rest %}
  {% set head = '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\n\n' %}
  {% set text = head ~ message.content | trim ~ '<|eot_id|>' %}
  {% if loop.index0 == 0 %}{% set text = bos_token + text + date_string %}{% endif %}
  {{- text -}}
{% endfor %}
{% if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{% endif %}
"""
GEMMA = """{{ bos_token }}
{%- set ns = namespace(system='', turns=0) -%}
{% if messages[0].role == 'system' %}
    {%- set ns.system = messages[0].content ~ '\n\n' %}
    {%- set messages = messages[1:] %}
{%- endif -%}
{% for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception("Roles must take turns:\n user, assistant") }}
    {%- endif %}
    {%- set ns.turns = ns.turns + 1 %}
<start_of_turn>{{ 'model' if message['role'] == 'assistant' else message['role'] }}
{{ (ns.system if loop.first else '') + message['content'] | trim }}<end_of_turn>
{% endfor %}
{% if add_generation_prompt %}<start_of_turn>model
{% endif %}
"""
MISTRAL = """{{ bos_token }}{% for message in messages if message.role != 'system' %}
{% if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]
{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}
{% else %}{{ raise_exception('Only user and assistant, not ' + message['role']) }}{% endif %}{% endfor %}"""
PARTS = """{# Whatever else a template may use. #}
{% macro turn(message, mark='#') %}{{ mark ~ message.role | upper }}: {{ caller() if caller else message.content }}
{% endmacro %}
{% for message in messages %}
    {% if message.content == '' %}{% continue %}{% endif %}
    {% if loop.index > 9 %}{% break %}{% endif %}
    {% generation %}{% set inside = 1 %}{{ turn(message) }}{% endgeneration %}{{ inside is defined }}
    {% call turn(message, mark=2 * '-') %}{{ message | tojson }}{% endcall %}
    {% filter upper %}{{ message.name | default('nobody') }}{% endfilter %}
{% else %}nothing{% endfor %}
{% set joined %}{{ messages | map(attribute='role') | join('; ') }}{% endset %}
{{ joined ~ 1 ~ none ~ missing }} {{ [1] + [2] }} {{ messages | tojson(indent=2, sort_keys=true) }}
{{ dict(a=joined)['a'].split(';')[-1] | trim }} {{ "<>&'" }} {{ "<>&'" | tojson }}"""
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA_3, "gemma": GEMMA, "mistral": MISTRAL, "parts": PARTS}

TALK = [
    {"role": "system", "content": "Answer in naïve 日本語 🙂."},
    {"role": "user", "content": "  What is {{ 7 * 7 }} {% raw %} {# } {{{ <b>&amp;</b> \" ' \\ \t?\n"},
    {"role": "assistant", "content": "{'a': [1]} → \u2028 ☕"},
    {"role": "user", "content": "{{ raise_exception('executed') }}", "name": "Zoë"},
]
CHATS = {"talk": TALK, "no_system": TALK[1:], "one": TALK[1:2], "wrong_order": TALK[2:]}
TOKENS = dict(bos_token="<s>", eos_token="</s>")


def error_of(template, messages=TALK, **changes) -> str:
    with pytest.raises(InputError) as error:
        render(template, messages, **TOKENS | changes)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def theirs():
    transformers = pytest.importorskip("transformers", reason="transformers not installed")
    backend = byte_tokenizer().backend
    backend.add_special_tokens(["<s>", "</s>"])

    def rendered(template, messages, add_generation_prompt=True, **tokens):
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    return rendered


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_renders_as_transformers(template, messages, add_generation_prompt, theirs):
    arguments = dict(TOKENS, add_generation_prompt=add_generation_prompt)
    template, messages = TEMPLATES[template], CHATS[messages]
    try:
        expected = theirs(template, messages, **arguments)
    except Exception as error:
        assert template is GEMMA and messages is CHATS["wrong_order"], error
        assert "refuses these messages: Roles must take turns: user, assistant" in error_of(template, messages)
    else:
        assert render(template, messages, **arguments) == expected


@pytest.mark.parametrize("tokens", [dict(TOKENS), dict(bos_token="<s>"), {}])
def test_a_token_that_there_is_not_is_undefined(tokens, theirs):
    template = "{{ bos_token }}|{{ eos_token }}|{{ bos_token is defined }}{{ eos_token is none }}"
    given = dict(bos_token=None, eos_token=None) | tokens
    assert render(template, TALK, **given) == theirs(template, TALK, **tokens)


def test_a_written_out_chat():
    assert render(CHATML, TALK[1:2], **TOKENS) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
        + TALK[1]["content"]
        + "<|im_end|>\n<|im_start|>assistant\n"
    )
    assert render(MISTRAL, TALK[:3], **TOKENS).startswith("<s>[INST]   What is {{ 7 * 7 }} {% raw %}")


def test_what_a_message_says_is_not_executed():
    raw = "{% for x in range(9) %}x{% endfor %}"
    for attack in ("{{ 7 * 7 }}", raw, "{{ ''.__class__ }}", "{# a #}", "{% endraw %}"):
        messages = [{"role": attack, "content": attack}]
        assert render("{{ messages[0].role }}{{ messages[0].content }}", messages, **TOKENS) == 2 * attack


def test_a_message_is_plain_text_to_the_template():
    """markupsafe's texts would escape what they are joined with."""
    messages = [{"role": "user", "content": Markup("<b>")}]
    assert render("{{ '<' + messages[0].content }}", messages, **TOKENS) == "<<b>"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ (''|attr('__class__')).__mro__ }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__.x }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ dict.mro() }}",
        "{{ self._TemplateReference__context.x }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ ''|attr('format')(1) }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ dict.update(messages[0], role='x') }}",
        "{{ namespace(__class__=1) }}",
        "{% set ns = namespace() %}{% set ns.__call__ = 1 %}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)
def test_the_sandbox_lets_nothing_out(template):
    assert "can't be rendered" in error_of(template)


@pytest.mark.parametrize(
    "template, reason",
    [
        ("{% for", "unexpected"),
        ("{{ x | nothing }}", "nothing"),
        ("{{ missing.content }}", "missing"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ messages['content'] + 1 }}", "undefined|object"),
        ("{% generation %}", "endgeneration"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "recursion"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{% for i in range(2) %}" * 30 + "{% endfor %}" * 30, "nested"),
        ("x" * (chat.MAX_TEMPLATE + 1), f"{chat.MAX_TEMPLATE + 1} characters"),
    ],
)
def test_a_wrong_template_is_one_line(template, reason):
    assert re.search(reason, error_of(template))


def test_a_reason_is_not_endless():
    assert len(error_of("{{ raise_exception('no' * 100000) }}")) < 600


NUMBER, SIZE = "a number beyond", "makes a text of more than 1048576"


def doubled(first: str, step: str) -> str:
    """`ns.x`, which begins as `first`, set again and again to `x` after `step`."""
    return f"{{% set ns = namespace(x={first}) %}}{{% for i in range(50) %}}{step}{{% set ns.x = x %}}{{% endfor %}}"


@pytest.mark.parametrize(
    "template, reason",
    [
        ("{% for i in range(100000) %}{{ 'x' * 1000 }}{% endfor %}", SIZE),
        ("{{ 'x' * 10000000000 }}", NUMBER),
        ("{{ 10000000000 * [1] }}", NUMBER),
        ("{{ ('x' * 1000000) * 1000000 }}", SIZE),
        ("{{ 1000000 * ((1,) * 1000000) }}", SIZE),
        ("{{ 9 ** 9 ** 9 }}", re.escape("'**' of int is not allowed")),
        ("{{ 'x'.ljust(10000000000) }}", NUMBER),
        ("{{ 'x'.ljust(width=10000000000) }}", NUMBER),
        ("{{ 'x' | center(10000000000) }}", NUMBER),
        ("{{ 'x' | center(width=10000000000) }}", NUMBER),
        ("{{ messages | tojson(indent=10000000000) }}", NUMBER),
        ("{{ '%10000000000d' % 1 }}", "'%' of str is not allowed"),
        ("{{ '%10000000000d' | format(1) }}", "No filter named 'format'"),
        ("{{ '{:10000000000}'.format(1) }}", "'format' is not allowed"),
        ("{{ lipsum(n=100000) }}", "'lipsum' is undefined"),
        ("{{ range(1000000) | list }}", "Range too big"),
        (doubled("'x'", "{% set x = ns.x ~ ns.x %}"), SIZE),
        (doubled("'x'", "{% set x = ns.x + ns.x %}"), SIZE),
        (doubled("[1]", "{% set x = ns.x + ns.x %}"), SIZE),
        (doubled("7", "{% set x = ns.x * ns.x %}"), NUMBER),
        (doubled("'x'", "{% set x %}{{ ns.x }}{{ ns.x }}{% endset %}"), SIZE),
    ],
)
def test_what_a_template_makes_is_bounded(template, reason, monkeypatch):
    monkeypatch.setattr(chat, "MAX_LENGTH", 2**20)
    assert re.search(reason, error_of(template))


def test_a_rendering_up_to_the_limit(monkeypatch):
    monkeypatch.setattr(chat, "MAX_LENGTH", 100)
    for template in ("{{ 50 * 'x' }}{{ 'x' * 50 }}", "{{ 'x' * 50 + 'x' * 50 }}", "{{ 'x' * 50 ~ 'x' * 50 }}"):
        assert render(template, TALK, **TOKENS) == "x" * 100
        assert "more than 100 characters" in error_of(template.replace("50 ", "51 "))


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% set ns = namespace(n=0) %}{% block a %}{% if ns.n < 60 %}{% set ns.n = ns.n + 1 %}"
        "{{ self.a() }}{{ self.a() }}{% set ns.n = ns.n - 1 %}{% endif %}{% endblock %}",
    ],
)
def test_what_never_ends_is_stopped(template, monkeypatch):
    monkeypatch.setattr(chat, "MAX_SECONDS", 0.2)
    began = time.thread_time()
    assert "more than 0.2 seconds" in error_of(template)
    assert time.thread_time() - began < 2


@pytest.mark.parametrize(
    "messages, place",
    [
        ([], "an empty one"),
        ((), "an empty one"),
        ("hello", "got str"),
        (None, "got NoneType"),
        ({"role": "user", "content": "x"}, "got dict"),
        (["hello"], "message 0 is str"),
        ([TALK[0], {"role": "user"}], "message 1 has no 'content'"),
        ([TALK[0], {"content": "x"}], "message 1 has no 'role'"),
        ([{"role": "user", "content": None}], "message 0: 'content' is NoneType"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], "message 0: 'content' is list"),
        ([{"role": 3, "content": "x"}], "message 0: 'role' is int"),
        ([{"role": "user", "content": "x", 3: "y"}], "message 0: 3 is"),
    ],
)
def test_messages_of_another_form_are_named(messages, place, unchecked):
    assert place in error_of(CHATML, messages)
