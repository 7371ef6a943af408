"""The official Anthropic client for Python against a server of the bundled model: its URL is the only argument."""

import asyncio
import sys

import anthropic

BASE_URL = sys.argv[1]
client = anthropic.Anthropic(base_url=BASE_URL, api_key="none", max_retries=0)
MODEL = client.models.list().data[0].id
# This version of the client has no argument for it.
GREEDY = {"extra_body": {"temperature": 0}}
HELLO = [{"role": "user", "content": "Hello! Who are you?"}]
WEATHER = {
    "name": "weather",
    "description": "Tells the weather of a day.",
    "input_schema": {
        "type": "object",
        "properties": {"day": {"type": "string", "enum": ["today", "tomorrow"]}},
        "required": ["day"],
        "additionalProperties": False,
    },
}


def message():
    said = client.messages.create(model=MODEL, max_tokens=40, messages=HELLO, **GREEDY)
    assert said.type == "message" and said.role == "assistant" and said.id.startswith("msg"), said
    assert said.content[0].type == "text" and said.content[0].text, said
    assert said.stop_reason in ("end_turn", "max_tokens") and said.usage.output_tokens <= 40, said
    again = client.messages.create(model=MODEL, max_tokens=40, messages=HELLO, **GREEDY)
    assert again.content == said.content
    assert again.usage.cache_read_input_tokens > 0
    total = again.usage.input_tokens + again.usage.cache_read_input_tokens
    assert total == said.usage.input_tokens + said.usage.cache_read_input_tokens
    assert client.messages.count_tokens(model=MODEL, messages=HELLO).input_tokens == total


def stream():
    said = client.messages.create(model=MODEL, max_tokens=40, messages=HELLO, **GREEDY)
    with client.messages.stream(model=MODEL, max_tokens=40, messages=HELLO, **GREEDY) as events:
        text = "".join(events.text_stream)
        final = events.get_final_message()
    assert text == said.content[0].text and final.content[0].text == text
    assert (final.stop_reason, final.usage.output_tokens) == (said.stop_reason, said.usage.output_tokens)


def conversation():
    blocks = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    first = client.messages.create(model=MODEL, max_tokens=8, messages=HELLO, system=blocks)
    goes_on = HELLO + [{"role": "assistant", "content": first.content}, {"role": "user", "content": "Go on."}]
    assert client.messages.create(model=MODEL, max_tokens=8, messages=goes_on, system="Be brief.").content


def stop():
    whole = client.messages.create(model=MODEL, max_tokens=30, messages=HELLO, **GREEDY).content[0].text
    word = whole.split()[1]
    cut = client.messages.create(model=MODEL, max_tokens=30, messages=HELLO, **GREEDY, stop_sequences=[word])
    assert (cut.stop_reason, cut.stop_sequence) == ("stop_sequence", word), cut
    assert "".join(block.text for block in cut.content) == whole[: whole.index(word)], (cut, whole)


def tools():
    named = {"type": "tool", "name": "weather"}
    called = client.messages.create(model=MODEL, max_tokens=60, messages=HELLO, tools=[WEATHER], tool_choice=named)
    call = called.content[0]
    assert (called.stop_reason, call.type, call.name) == ("tool_use", "tool_use", "weather"), called
    assert call.input["day"] in ("today", "tomorrow"), called
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "It rains."}], "is_error": False}
    messages = HELLO + [
        {"role": "assistant", "content": called.content},
        {"role": "user", "content": [result, {"type": "text", "text": "And now?"}]},
    ]
    assert client.messages.create(model=MODEL, max_tokens=8, messages=messages, tools=[WEATHER]).content
    one = {"type": "any", "disable_parallel_tool_use": True}
    with client.messages.stream(model=MODEL, max_tokens=60, messages=HELLO, tools=[WEATHER], tool_choice=one) as events:
        kinds = [event.type for event in events]
        final = events.get_final_message()
    assert "input_json" in kinds and final.content[0].input["day"] in ("today", "tomorrow"), (kinds, final)


def structured_output():
    schema = {
        "type": "object",
        "properties": {"mood": {"enum": ["glad", "sad"]}},
        "required": ["mood"],
        "additionalProperties": False,
    }
    said = client.messages.create(
        model=MODEL, max_tokens=40, messages=HELLO, output_config={"format": {"type": "json_schema", "schema": schema}}
    )
    assert said.content[0].text.replace(" ", "") in ('{"mood":"glad"}', '{"mood":"sad"}'), said


def refusals():
    prefilled = HELLO + [{"role": "assistant", "content": "I am"}]
    picture = [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "https://example.org/x.png"}}]}]
    for wrong in [
        {"messages": HELLO, "extra_body": {"temperature": -1}},
        {"messages": prefilled},
        {"messages": picture},
        {"messages": HELLO, "extra_body": {"nonsense": 1}},
        {"messages": HELLO, "tool_choice": {"type": "any"}},
        {"messages": [{"role": "user", "content": "word " * 3000}]},
    ]:
        try:
            client.messages.create(model=MODEL, max_tokens=5, **wrong)
        except anthropic.BadRequestError as error:
            assert error.body["type"] == "error" and error.body["error"]["type"] == "invalid_request_error", error.body
        else:
            raise AssertionError(f"{wrong} was not refused")
    try:
        client.messages.create(model="other", max_tokens=5, messages=HELLO)
    except anthropic.NotFoundError as error:
        assert error.body["error"]["type"] == "not_found_error", error.body
    else:
        raise AssertionError("there is no such model")


async def at_a_time():
    other = anthropic.AsyncAnthropic(base_url=BASE_URL, api_key="none", max_retries=0)

    async def ask(number):
        messages = [{"role": "user", "content": f"Number {number}?"}]
        return (await other.messages.create(model=MODEL, max_tokens=20, messages=messages, **GREEDY)).content

    async def stream(number):
        messages = [{"role": "user", "content": f"Number {number}?"}]
        async with other.messages.stream(model=MODEL, max_tokens=20, messages=messages, **GREEDY) as events:
            return (await events.get_final_message()).content

    alone = [await ask(number) for number in range(4)]
    together = await asyncio.gather(*[kind(number) for number in range(4) for kind in (ask, stream)])
    texts = [[block.text for block in content] for content in together]
    assert texts[0::2] == texts[1::2] == [[block.text for block in content] for content in alone], texts


for test in [message, stream, conversation, stop, tools, structured_output, refusals]:
    test()
    print(f"{test.__name__}: ok")
asyncio.run(at_a_time())
print("at_a_time: ok")
