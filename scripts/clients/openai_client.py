"""The official Python client against a server of the bundled model: BASE_URL is its only argument."""

import asyncio
import json
import sys
from typing import Literal

import openai
from pydantic import BaseModel, Field

BASE_URL = sys.argv[1]
client = openai.OpenAI(base_url=BASE_URL, api_key="none", max_retries=0)
MODEL = client.models.list().data[0].id
HELLO = [{"role": "user", "content": "Hello! Who are you?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather of a day.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"day": {"type": "string", "enum": ["today", "tomorrow"]}},
            "required": ["day"],
            "additionalProperties": False,
        },
    },
}


class Person(BaseModel):
    name: str = Field(max_length=20)
    age: int = Field(ge=1, le=120)
    mood: Literal["glad", "sad"]
    friends: list["Friend"] = Field(max_length=2)


class Friend(BaseModel):
    name: str = Field(max_length=10)


def models():
    assert client.models.retrieve(MODEL).id == MODEL
    try:
        client.models.retrieve("other")
    except openai.NotFoundError as error:
        assert error.code == "model_not_found", error
    else:
        raise AssertionError("there is no such model")


def chat():
    one = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=40, seed=1)
    choice = one.choices[0]
    assert choice.message.content and choice.finish_reason in ("stop", "length"), one
    assert one.usage.total_tokens == one.usage.prompt_tokens + one.usage.completion_tokens
    again = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=40, seed=1)
    assert again.choices[0].message.content == choice.message.content
    pieces = []
    usage = None
    stream = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=40, seed=1, stream=True, stream_options={"include_usage": True}
    )
    for chunk in stream:
        pieces += [piece.delta.content for piece in chunk.choices if piece.delta.content]
        usage = chunk.usage or usage
    assert "".join(pieces) == choice.message.content, pieces
    assert usage.completion_tokens == one.usage.completion_tokens


def several_answers():
    many = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=20, seed=5, n=3, temperature=1.0)
    assert [choice.index for choice in many.choices] == [0, 1, 2]
    parts = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    assert client.chat.completions.create(model=MODEL, messages=parts, max_completion_tokens=5).choices[0].message.content


def logprobs():
    scored = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=10, logprobs=True, top_logprobs=3, temperature=0
    )
    content = scored.choices[0].logprobs.content
    assert len(content) == scored.usage.completion_tokens
    for token in content:
        assert len(token.top_logprobs) == 3 and token.logprob <= 0
        assert token.top_logprobs[0].logprob >= token.logprob
    text = client.completions.create(model=MODEL, prompt="Once upon a time", max_tokens=4, logprobs=2, echo=True)
    scores = text.choices[0].logprobs
    assert scores.token_logprobs[0] is None and "".join(scores.tokens) == text.choices[0].text
    biased = client.completions.create(model=MODEL, prompt="Once", max_tokens=3, logit_bias={"40": 100}, temperature=0)
    assert len(set(biased.choices[0].text)) >= 1


def stop():
    whole = client.completions.create(model=MODEL, prompt="Once upon a time", max_tokens=30, temperature=0).choices[0].text
    word = whole.split()[3]
    cut = client.completions.create(model=MODEL, prompt="Once upon a time", max_tokens=30, temperature=0, stop=[word])
    assert cut.choices[0].text == whole[: whole.index(word)] and cut.choices[0].finish_reason == "stop"


def structured_output():
    parsed = client.chat.completions.parse(
        model=MODEL, messages=HELLO, response_format=Person, max_tokens=200, seed=3, temperature=1.0
    )
    person = parsed.choices[0].message.parsed
    assert isinstance(person, Person) and 1 <= person.age <= 120, parsed
    with client.chat.completions.stream(
        model=MODEL, messages=HELLO, response_format=Person, max_tokens=200, seed=3, temperature=1.0
    ) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.parsed == person
    loose = client.chat.completions.create(
        model=MODEL, messages=HELLO, response_format={"type": "json_object"}, max_tokens=300, seed=1
    )
    if loose.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(loose.choices[0].message.content), dict)


def tools():
    named = {"type": "function", "function": {"name": "weather"}}
    called = client.chat.completions.create(model=MODEL, messages=HELLO, tools=[WEATHER], tool_choice=named, max_tokens=60)
    call = called.choices[0].message.tool_calls[0]
    assert call.function.name == "weather" and called.choices[0].finish_reason == "tool_calls", called
    assert json.loads(call.function.arguments)["day"] in ("today", "tomorrow")
    # The conversation goes on with the call and what came of it, as the client gives them.
    messages = HELLO + [
        called.choices[0].message,
        {"role": "tool", "tool_call_id": call.id, "content": "It rains."},
    ]
    assert client.chat.completions.create(model=MODEL, messages=messages, tools=[WEATHER], max_tokens=10).choices
    with client.chat.completions.stream(
        model=MODEL, messages=HELLO, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, max_tokens=60
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion().choices[0].message.tool_calls[0].function
    assert "tool_calls.function.arguments.done" in kinds and final.name == "weather", kinds


def responses():
    first = client.responses.create(model=MODEL, input="Hello! Who are you?", max_output_tokens=20, temperature=0)
    assert first.object == "response" and first.output_text and first.status in ("completed", "incomplete"), first
    assert first.usage.total_tokens == first.usage.input_tokens + first.usage.output_tokens
    chat = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=20, temperature=0)
    assert first.output_text == chat.choices[0].message.content, (first, chat)
    assert client.responses.retrieve(first.id).output == first.output

    # What the server remembers is what the client could have said itself.
    goes_on = client.responses.create(
        model=MODEL, input="Go on.", previous_response_id=first.id, max_output_tokens=20, temperature=0, instructions="Be brief."
    )
    said = [{"role": "user", "content": "Hello! Who are you?"}, *first.output, {"role": "user", "content": "Go on."}]
    again = client.responses.create(
        model=MODEL, input=said, max_output_tokens=20, temperature=0, instructions="Be brief.", store=False
    )
    assert again.output_text == goes_on.output_text and again.usage.input_tokens == goes_on.usage.input_tokens
    client.responses.delete(first.id)
    for forgotten in (first.id, again.id):
        try:
            client.responses.retrieve(forgotten)
        except openai.NotFoundError:
            continue
        raise AssertionError(f"{forgotten} is there")

    with client.responses.stream(model=MODEL, input="Hello! Who are you?", max_output_tokens=20, temperature=0) as stream:
        events = list(stream)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == first.output_text
    assert events[-1].response.output_text == first.output_text, events[-1]

    scored = client.responses.create(
        model=MODEL, input="Hello", max_output_tokens=5, include=["message.output_text.logprobs"], top_logprobs=2
    )
    assert all(len(token.top_logprobs) == 2 for token in scored.output[0].content[0].logprobs), scored


def responses_with_tools():
    weather = {"type": "function", **WEATHER["function"]}
    named = {"type": "function", "name": "weather"}
    called = client.responses.create(model=MODEL, input="Hello!", tools=[weather], tool_choice=named, max_output_tokens=60)
    call = called.output[0]
    assert call.type == "function_call" and json.loads(call.arguments)["day"] in ("today", "tomorrow"), called
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "It rains."}
    goes_on = client.responses.create(
        model=MODEL, input=[result], tools=[weather], previous_response_id=called.id, max_output_tokens=8
    )
    assert goes_on.previous_response_id == called.id and goes_on.output, goes_on
    with client.responses.stream(
        model=MODEL, input="Hello!", tools=[weather], tool_choice=named, max_output_tokens=60
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response().output[0]
    assert "response.function_call_arguments.done" in kinds and final.name == "weather", kinds
    parsed = client.responses.parse(model=MODEL, input="Hello!", text_format=Person, max_output_tokens=200, temperature=1.0)
    assert isinstance(parsed.output_parsed, Person), parsed


def embeddings():
    texts = ["The cat sat by the fire.", "She signed the contract."]
    # The client asks for base64 where nothing is said, and for numbers otherwise.
    coded = client.embeddings.create(model=MODEL, input=texts)
    plain = client.embeddings.create(model=MODEL, input=texts, encoding_format="float", user="someone")
    assert [item.index for item in coded.data] == [0, 1] and coded.usage.prompt_tokens > 0, coded.usage
    for one, other in zip(coded.data, plain.data):
        assert all(abs(x - y) < 1e-7 for x, y in zip(one.embedding, other.embedding, strict=True))
        assert abs(sum(x * x for x in one.embedding) - 1) < 1e-5
    short = client.embeddings.create(model=MODEL, input=texts[0], dimensions=32)
    assert len(short.data[0].embedding) == 32


def refusals():
    for wrong, param in [({"temperature": -1}, "temperature"), ({"n": 0}, "n"), ({"extra_body": {"nonsense": 1}}, "nonsense")]:
        try:
            client.chat.completions.create(model=MODEL, messages=HELLO, **wrong)
        except openai.BadRequestError as error:
            assert error.param == param, error
        else:
            raise AssertionError(f"{wrong} was not refused")
    try:
        client.completions.create(model=MODEL, prompt="word " * 3000)
    except openai.BadRequestError as error:
        assert error.code == "context_length_exceeded", error
    else:
        raise AssertionError("a prompt longer than the context was not refused")


async def at_a_time():
    other = openai.AsyncOpenAI(base_url=BASE_URL, api_key="none", max_retries=0)

    async def ask(seed):
        answer = await other.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=30, seed=seed, temperature=1.0)
        return answer.choices[0].message.content

    async def stream(seed):
        pieces = await other.chat.completions.create(
            model=MODEL, messages=HELLO, max_tokens=30, seed=seed, temperature=1.0, stream=True
        )
        return "".join([piece.delta.content or "" async for chunk in pieces for piece in chunk.choices])

    async def leave(seed):
        pieces = await other.chat.completions.create(model=MODEL, messages=HELLO, seed=seed, stream=True)
        async for _ in pieces:
            break
        await pieces.close()

    alone = [await ask(seed) for seed in range(6)]
    together = await asyncio.gather(*[kind(seed) for seed in range(6) for kind in (ask, stream, leave)])
    assert together[0::3] == alone and together[1::3] == alone


for test in [models, chat, several_answers, logprobs, stop, structured_output, tools, responses, responses_with_tools, embeddings, refusals]:
    test()
    print(f"{test.__name__}: ok")
asyncio.run(at_a_time())
print("at_a_time: ok")
