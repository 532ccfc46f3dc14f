"""The order of things, failures and waits of one generation, against toy services in this process.

The tokens that a seed means are computed by `SeedText`, token by token, without rounds. So every test can say to the
letter what must come out, whatever went wrong on the way.
"""

from __future__ import annotations

from dataclasses import astuple
from itertools import pairwise
from random import Random
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from outrider.v1 import draft_pb2
from outrider_client.connection import (
    SEEDED_BLOCK_LENGTH,
    ConnectionSettings,
    Target,
    begin_conversation,
    lengths_for,
    request_of,
)
from outrider_client.conversation.conversation import Conversation
from outrider_client.conversation.effects import Describe, Link, Open, Send, Wait
from outrider_client.conversation.patience import Patience
from outrider_client.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    ServiceUnavailableError,
)
from outrider_client.params import SamplingParams, SpeculationParams
from outrider_client.results import Chunk, GenerationResult
from outrider_client.rules.rules import rule_of
from outrider_client.speculation_length import PairSpeeds, RoundTimes
from outrider_client.text.text import TargetTokenizer
from tests import toy_services as toys
from tests.toy_services import (
    EVERY_K,
    NUM_TOKENS,
    TARGET_ONLY_TEXT,
    TEXT,
    SeedText,
    World,
    fail_requests,
    make_conversation,
    model_info,
    run,
)


class TestSeedInvariance:
    """One seed gives one text, for every order in which messages can come and every way to work."""

    @settings(max_examples=25)
    @pytest.mark.parametrize("num_speculative_tokens", EVERY_K)
    @given(
        order=st.integers(0, 2**32),
        draft_speed=st.sampled_from([0.05, 0.3, 1.0, 10.0]),
        latency=st.sampled_from([0.0, 0.3, 0.9]),
        overlap=st.booleans(),
        min_draft_prob=st.sampled_from([0.0, 0.3]),
    )
    def test_under_any_order_of_events(self, num_speculative_tokens, order, draft_speed, latency, **speculation):
        world = World(order, draft_speed, latency)
        result = run(world, num_speculative_tokens=num_speculative_tokens, **speculation)
        assert result.token_ids == TEXT
        assert world.num_timeouts == result.stats.num_rounds_without_draft == 0
        assert world.num_opened == {Link.TARGET: 1, Link.DRAFT: 1}

    @pytest.mark.parametrize("window", [1, 2, 4, 7, 16, 100])
    @pytest.mark.parametrize("num_speculative_tokens", [1, 5])
    def test_for_every_window(self, window, num_speculative_tokens):
        for order in range(5):
            result = run(World(order), num_speculative_tokens=num_speculative_tokens, window=window)
            assert result.token_ids == TEXT

    @pytest.mark.parametrize("temperature", [0.0, 0.6, 1.5])
    @pytest.mark.parametrize(
        "draft", [{}, {"greedy_draft": True}, {"max_support": 3}], ids=["plain", "greedy", "support"]
    )
    def test_for_every_way_to_draw(self, temperature, draft):
        expected = SeedText(temperature=temperature, **draft).text(NUM_TOKENS)
        for num_speculative_tokens in EVERY_K:
            world = World(num_speculative_tokens)
            settings = {"temperature": temperature, "num_speculative_tokens": num_speculative_tokens}
            assert run(world, **settings, **draft).token_ids == expected

    def test_another_seed_gives_another_text(self):
        assert run(seed=12).token_ids == SeedText(seed=12).text(NUM_TOKENS) != TEXT

    def test_greedy_text_is_that_of_the_target_only(self):
        assert run(temperature=0.0).token_ids == SeedText(temperature=0.0).text(NUM_TOKENS, target_only=True)

    @settings(max_examples=25)
    @pytest.mark.parametrize("num_speculative_tokens", EVERY_K)
    @given(
        order=st.integers(0, 2**32),
        impatience=st.sampled_from([0.1, 0.3, 0.7]),
        draft_speed=st.sampled_from([0.05, 0.3, 1.0, 10.0]),
        min_draft_prob=st.sampled_from([0.0, 0.3]),
    )
    def test_where_the_draft_is_late_each_token_is_what_its_round_makes_it(
        self, num_speculative_tokens, order, impatience, draft_speed, min_draft_prob
    ):
        """A round that the draft misses draws its token itself; proposals in flight then agree with it or do not."""
        world = World(order, draft_speed, impatience=impatience)
        result = run(world, num_speculative_tokens=num_speculative_tokens, min_draft_prob=min_draft_prob)
        SeedText().check(result, world)
        assert len(result.token_ids) == NUM_TOKENS
        assert result.stats.num_rounds_without_draft == list(world.num_proposals_at.values()).count(0)


class AnyLengths:
    """Any K from 0 to 5 for each round."""

    def __init__(self, seed: int):
        self._random, self.learned, self.num_open = Random(seed), [], 0

    def begin(self) -> None:
        self.num_open += 1

    def end(self) -> None:
        self.num_open -= 1

    def learn(self, times: RoundTimes) -> None:
        assert self.num_open == 1
        self.learned.append(times)

    def next_length(self) -> int:
        return self._random.choice([0, 0, 1, 2, 3, 5])

    @property
    def least_share(self) -> float:
        return self._random.choice([0.3, 0.75, 1.0])

    @property
    def needs_draft(self) -> bool:
        return self._random.random() < 0.5


class Scripted:
    """Lengths, and what is said of the draft at each, in this order; the last ones again for ever."""

    least_share = 1.0

    def __init__(self, lengths: list[int], needs_draft: list[int]):
        self._lengths, self._needs_draft, self.num_asked = lengths, needs_draft, 0

    def begin(self) -> None:
        pass

    def end(self) -> None:
        pass

    def learn(self, times: RoundTimes) -> None:
        pass

    def next_length(self) -> int:
        self.num_asked += 1
        return self._lengths[min(self.num_asked, len(self._lengths)) - 1]

    @property
    def needs_draft(self) -> bool:
        return bool(self._needs_draft[min(self.num_asked, len(self._needs_draft)) - 1])


class TestLengthsThatChange:
    """Rounds without proposals leave the draft as it was; the next commit sends it all of them."""

    @settings(max_examples=100)
    @given(
        order=st.integers(0, 2**32),
        draft_speed=st.sampled_from([0.05, 0.3, 1.0, 10.0]),
        impatience=st.sampled_from([0.0, 0.3]),
        min_draft_prob=st.sampled_from([0.0, 0.3]),
        overlap=st.booleans(),
    )
    def test_each_token_is_what_its_round_makes_it(self, order, draft_speed, impatience, **speculation):
        world = World(order, draft_speed, impatience=impatience)
        result, _ = world.run(make_conversation(world, lengths=AnyLengths(order), **speculation))
        SeedText().check(result, world)
        assert len(result.token_ids) == NUM_TOKENS
        assert result.stats.num_cache_mismatches == result.stats.num_draft_failures - world.num_timeouts == 0
        assert world.num_opened[Link.TARGET] == 1

    @pytest.mark.parametrize(("num_there", "least_share", "waits"), [(3, 1.0, True), (3, 0.75, False), (2, 0.75, True)])
    def test_a_round_goes_at_once_with_most_of_its_proposals_where_k_has_grown(self, num_there, least_share, waits):
        """The draft was asked for fewer than the 4 that are wanted now."""
        world, lengths = World(), Scripted([4], needs_draft=[1])
        lengths.least_share = least_share
        conversation = make_conversation(world, lengths=lengths)
        link, conversation._draft.is_open = conversation._generation.draft, True
        link.info, link.proposals = world.draft_info, [draft_pb2.Proposal(token_id=1)] * num_there
        steps = conversation._gather_proposals(4)
        assert next(steps) == Wait(0.0)
        if waits:
            assert steps.send(None).timeout_s > 0
        else:
            with pytest.raises(StopIteration) as stop:
                steps.send(None)
            assert stop.value.value == num_there

    @pytest.mark.parametrize("num_steps", [1, 7])
    def test_a_generation_that_is_given_up_is_open_no_more(self, num_steps):
        lengths = AnyLengths(3)
        steps = make_conversation(World(3), lengths=lengths).run()
        for _ in range(num_steps):
            next(steps)
        assert lengths.num_open == 1
        steps.close()
        assert lengths.num_open == 0

    def test_a_draft_that_is_to_be_asked_soon_is_sent_all_tokens_once_and_never_waited_for(self):
        """It is opened before the first round, falls behind, and is sent them before rounds with proposals begin."""
        world, seen = World(3), []
        lengths = Scripted([0] * 12 + [3] * 20, needs_draft=[1, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1])

        def note(stream, message) -> None:
            if stream.link is Link.DRAFT:
                seen.append((lengths.num_asked, message.WhichOneof("kind")))

        world.on_arrival = note
        world.on_effect = lambda effect: self.assert_not_waiting_for_the_draft(effect, lengths)
        result, _ = world.run(make_conversation(world, lengths=lengths))
        assert len(result.token_ids) == NUM_TOKENS
        first_commits = [asked for asked, kind in seen if kind == "commit"][:2]
        assert seen[0][1] == "open"
        assert 9 <= first_commits[0] <= first_commits[1]
        assert first_commits[1] > 12

    def test_the_target_has_its_first_round_before_the_draft_is_described_and_opened(self):
        world, effects = World(3), []
        world.on_effect = lambda effect: effects.append((type(effect), getattr(effect, "link", None)))
        world.run(make_conversation(world, lengths=Scripted([0, 0, 3], needs_draft=[1])))
        target, draft = Link.TARGET, Link.DRAFT
        assert effects[:5] == [(Open, target), (Send, target), (Describe, None), (Open, draft), (Wait, None)]

    @staticmethod
    def assert_not_waiting_for_the_draft(effect, lengths) -> None:
        """Without proposals there are only waits for the target, which are long."""
        if isinstance(effect, Wait) and lengths.num_asked <= 12:
            assert effect.timeout_s is None or effect.timeout_s >= Patience().round_s

    def test_rounds_are_learned_from_but_the_first_and_those_that_the_draft_let_down(self):
        world = World(3, draft_speed=0.3, impatience=0.3)
        lengths = AnyLengths(3)
        stats = world.run(make_conversation(world, lengths=lengths))[0].stats
        assert 0 < len(lengths.learned) < stats.num_rounds
        assert lengths.num_open == 0
        without_failures = World(3)
        lengths = AnyLengths(3)
        stats = without_failures.run(make_conversation(without_failures, lengths=lengths))[0].stats
        assert [times.num_proposals for times in lengths.learned] == [one.num_draft_tokens for one in stats.rounds[1:]]
        assert sum(times.num_accepted for times in lengths.learned) <= stats.num_accepted_tokens

    @pytest.mark.parametrize(
        ("speculation", "are_known"), [({}, True), ({"rule": "block"}, False), ({"rule": "shared_noise"}, False)]
    )
    def test_how_probable_the_judged_proposals_were_is_learned_where_it_is_known(self, speculation, are_known):
        world, lengths = World(3), AnyLengths(3)
        world.run(make_conversation(world, lengths=lengths, **speculation))
        numbers = [min(times.num_accepted + 1, times.num_proposals) for times in lengths.learned]
        assert [len(times.accept_probs) for times in lengths.learned] == numbers
        assert [len(times.overlaps) for times in lengths.learned] == [number * are_known for number in numbers]
        between = {prob for times in lengths.learned for prob in times.accept_probs if 0 < prob < 1}
        assert bool(between) == are_known

    def test_rounds_last_from_one_to_the_next_so_that_no_time_is_nobodys(self):
        """But the times in which the caller keeps a chunk. The first round is not learned from."""
        world, lengths = World(3), AnyLengths(3)
        ends: list[float] = []
        next_length = lengths.next_length

        def note_end() -> int:
            ends.append(world.now)
            return next_length()

        def let_time_pass(effect) -> None:
            world.now += 100.0 if isinstance(effect, Chunk) else 0.001

        world.on_effect, lengths.next_length = let_time_pass, note_end
        world.run(make_conversation(world, lengths=lengths))
        _, first, *others = ends
        assert [times.round_s for times in lengths.learned] == pytest.approx(
            [end - start - 100.0 for start, end in pairwise([first, *others])]
        )

    @pytest.mark.parametrize(
        ("sampling", "speculation", "least"),
        [
            ({"seed": 1}, {}, 0),
            ({"seed": 1}, {"rule": "rejection"}, 1),
            ({}, {}, 0),
            ({"seed": 1, "temperature": 0}, {"rule": "rejection"}, 0),
            ({"seed": 1}, {"rule": "shared_noise"}, 0),
            ({}, {"rule": "block"}, 0),
        ],
        ids=["seed", "seed_rejection", "no_seed", "greedy", "shared_noise", "block"],
    )
    def test_a_useless_draft_is_left_unused_unless_that_would_change_the_text(self, sampling, speculation, least):
        chosen = self.lengths(sampling, speculation)
        assert min(chosen.next_length() for _ in range(20)) == least

    def test_block_acceptance_with_a_seed_has_one_length(self):
        chosen = self.lengths({"seed": 1}, {"rule": "block"})
        assert {chosen.next_length() for _ in range(20)} == {SEEDED_BLOCK_LENGTH}

    @staticmethod
    def lengths(sampling: dict, speculation: dict) -> Any:
        """Return what chooses K at a draft that is known to be useless."""
        params, speeds = SpeculationParams(**speculation), PairSpeeds()
        rule = rule_of(params.rule, has_seed="seed" in sampling)
        speed = speeds.at(sampling.get("temperature", 1.0), rule.name)
        for _ in range(50):
            speed.learn(RoundTimes(0, 0, 0.01, 0.0))
            speed.learn(RoundTimes(3, 0, 0.05, 0.01))
        return lengths_for(params, rule, SamplingParams(**sampling), speeds)


def test_rounds_without_draft_do_occur_when_the_draft_is_late():
    """Else the test above proves less than it says: rounds of both kinds occur, and tokens that differ by them."""
    world = World(3, draft_speed=0.3, impatience=0.3)
    stats = run(world, num_speculative_tokens=3).stats
    assert 0 < stats.num_rounds_without_draft < stats.num_rounds
    assert TEXT != TARGET_ONLY_TEXT


class TestMethods:
    @pytest.mark.parametrize(
        "settings", [{"method": "autoregressive"}, {"num_speculative_tokens": 0}], ids=["method", "k_0"]
    )
    def test_target_only_never_opens_the_draft(self, settings):
        world = World()
        result = run(world, **settings)
        assert result.token_ids == TARGET_ONLY_TEXT
        assert world.num_opened == {Link.TARGET: 1, Link.DRAFT: 0}
        stats = result.stats
        assert (stats.num_rounds, stats.num_draft_tokens, stats.num_rounds_without_draft) == (NUM_TOKENS, 0, 0)
        assert stats.mean_acceptance_length == 1.0

    @pytest.mark.parametrize("min_draft_prob", [0.0, 0.9])
    def test_draft_only_never_opens_the_target(self, min_draft_prob):
        world = World()
        result = run(world, method="draft", min_draft_prob=min_draft_prob)
        uniforms = toys.AddressedUniforms(11, toys.Purpose.DRAFT)
        tokens = toys.TokenLog(toys.PROMPT_IDS)
        for position in range(len(tokens), len(tokens) + NUM_TOKENS):
            model = toys.ToyModel(toys.DRAFT_LOGITS)
            tokens.extend([toys.draft_proposal(model, tokens, uniforms.at(position), 0).token_id])
        assert result.token_ids == tokens[len(toys.PROMPT_IDS) :]
        assert world.num_opened == {Link.TARGET: 0, Link.DRAFT: 1}
        assert (result.finish_reason, result.stats.num_rounds) == ("length", 0)

    def test_draft_only_comes_back_after_a_broken_stream(self):
        expected = run(method="draft").token_ids
        world = World()
        fail_responses = {2: grpc.StatusCode.UNAVAILABLE, 9: grpc.StatusCode.INTERNAL}
        fail_requests(world, Link.DRAFT, fail_responses, after_answer=True)
        assert run(world, method="draft").token_ids == expected
        assert world.num_opened[Link.DRAFT] == 3

    def test_draft_only_ends_at_its_context(self):
        world = World()
        world.draft_info = model_info(context_length=10)
        result = run(world, method="draft")
        assert (len(result.token_ids), result.finish_reason) == (7, "length")

    def test_draft_only_gives_up_after_the_retry_time(self):
        world = World()
        world.draft_info = None
        with pytest.raises(ServiceUnavailableError, match="the draft did not answer"):
            run(world, method="draft", patience=Patience(retry_s=7.0))
        assert 7.0 <= world.now - 1000 <= 7.0 + Patience().longest_backoff_s


class TestChunksAndCounts:
    @pytest.mark.parametrize("num_speculative_tokens", EVERY_K)
    def test_chunks_are_rounds_and_add_up(self, num_speculative_tokens):
        world = World(1)
        result, chunks = world.run(make_conversation(world, num_speculative_tokens=num_speculative_tokens))
        stats = result.stats
        assert [token_id for chunk in chunks for token_id in chunk.token_ids] == result.token_ids
        assert len(chunks) == stats.num_rounds == len(world.num_proposals_at)
        segments = [segment for chunk in chunks for segment in chunk.segments]
        assert sum(segment.is_drafted for segment in segments) == stats.num_accepted_tokens
        assert len(segments) == stats.num_generated_tokens == NUM_TOKENS
        assert sum(world.num_proposals_at.values()) == stats.num_draft_tokens
        assert sum(stats.num_draft_tokens_per_position) == stats.num_draft_tokens
        assert sum(stats.num_accepted_tokens_per_position) == stats.num_accepted_tokens
        assert stats.mean_acceptance_length == NUM_TOKENS / stats.num_rounds
        assert stats.acceptance_rate == stats.num_accepted_tokens / stats.num_draft_tokens
        assert 0 < stats.acceptance_rate < 1

    @pytest.mark.parametrize(
        "settings",
        [{}, {"rule": "block"}, {"rule": "shared_noise"}, {"method": "autoregressive"}, {"seed": 7}],
        ids=str,
    )
    def test_chunks_tell_the_targets_probability_of_each_token(self, settings):
        world = World(1)
        result, chunks = world.run(make_conversation(world, num_speculative_tokens=4, **settings))
        assert [prob for chunk in chunks for prob in chunk.token_probs] == result.token_probs
        tokens = toys.TokenLog([*result.prompt_token_ids, *result.token_ids])
        model = toys.ToyModel(toys.TARGET_LOGITS)
        expected = [
            model.probs(tokens, position)[tokens[position]]
            for position in range(len(result.prompt_token_ids), len(tokens))
        ]
        assert result.token_probs == pytest.approx(expected, abs=2**-18 + 1e-6)

    def test_a_probability_that_the_target_does_not_tell_is_none(self):
        def leave_out(stream, message):
            for row in message.rows if stream.link is Link.TARGET else ():
                row.outside_token_prob = 0

        world = World(1)
        world.on_response = leave_out
        assert set(run(world, rule="shared_noise").token_probs) == {None}
        assert run(World(1), method="draft").token_probs == [None] * NUM_TOKENS

    def test_rounds_divide_tokens_and_waits_among_them(self):
        world = World(1)

        def pass_time():
            world.now += 0.25

        def set_times(stream, message):
            message.timing.queue_ms, message.timing.forward_ms = 1.0, 2.0

        world.on_wait, world.on_response = pass_time, set_times
        result, chunks = world.run(make_conversation(world, num_speculative_tokens=3))
        stats, rounds = result.stats, result.stats.rounds
        assert [one.num_committed_tokens for one in rounds] == [len(chunk.token_ids) for chunk in chunks]
        assert [one.num_draft_tokens for one in rounds] == list(world.num_proposals_at.values())
        assert min(one.target_wait_s for one in rounds) > 0
        totals = [sum(times) for times in zip(*(astuple(one)[2:] for one in rounds), strict=True)]
        assert totals == pytest.approx(stats.waits_s())
        assert totals[2:] == pytest.approx([0.001 * len(rounds), 0.002 * len(rounds)])
        assert max(stats.draft_forward_s) == 0.002  # a message with one token
        assert len(stats.draft_forward_s) >= len(rounds)

    def test_bytes_are_counted_in_both_directions(self):
        world = World()
        num_bytes = dict.fromkeys(Link, 0)

        def count(stream, message):
            num_bytes[stream.link] += message.ByteSize()

        world.on_response = count
        result = run(world, method="autoregressive")
        assert result.stats.num_bytes_received == num_bytes[Link.TARGET]
        assert result.stats.num_bytes_sent > 0

    @pytest.mark.parametrize("num_speculative_tokens", EVERY_K)
    def test_max_new_tokens_ends_inside_a_run(self, num_speculative_tokens):
        for max_new_tokens in (1, 2, 7):
            result = run(num_speculative_tokens=num_speculative_tokens, max_new_tokens=max_new_tokens)
            assert (result.token_ids, result.finish_reason) == (TEXT[:max_new_tokens], "length")

    @pytest.mark.parametrize("num_speculative_tokens", EVERY_K)
    def test_end_of_sequence_ends_inside_a_run(self, num_speculative_tokens):
        """Every token of the text is tried as the end; what lies behind it is neither kept nor counted."""
        for eos_id in set(TEXT):
            world = World(eos_id, draft_speed=10.0)
            result, chunks = world.run(
                make_conversation(world, num_speculative_tokens=num_speculative_tokens, eos_token_ids=[eos_id])
            )
            end = TEXT.index(eos_id) + 1
            assert (result.token_ids, result.finish_reason) == (TEXT[:end], "stop")
            stats = result.stats
            assert stats.num_generated_tokens == end
            assert stats.num_accepted_tokens <= stats.num_draft_tokens
            assert stats.num_draft_tokens - stats.num_accepted_tokens <= stats.num_rounds * num_speculative_tokens
            assert sum(len(chunk.token_ids) for chunk in chunks) == end

    def test_proposals_behind_an_accepted_end_are_not_counted(self):
        """Greedy and one model for both would accept all 8; the end stands at the third."""
        eos_id = next(token_id for token_id in TEXT if TEXT.index(token_id) >= 2)
        stats = run(num_speculative_tokens=8, eos_token_ids=[eos_id]).stats
        assert stats.num_draft_tokens <= stats.num_generated_tokens + stats.num_rounds * 7
        assert len(stats.num_draft_tokens_per_position) == len(stats.num_accepted_tokens_per_position)


class TestDeadline:
    def test_it_ends_the_wait_for_a_frozen_target_and_keeps_the_partial_text(self):
        world = World()
        num_rounds = 0

        def swallow(stream, message):
            nonlocal num_rounds
            if stream.link is Link.TARGET and message.HasField("round"):
                num_rounds += 1
                if num_rounds == 4:
                    stream.session.answer = lambda message: None  # type: ignore[method-assign]

        world.on_arrival = swallow
        with pytest.raises(DeadlineExceededError) as caught:
            run(world, timeout=5.0)
        assert world.now - 1000 == pytest.approx(5.0)
        partial = caught.value.partial
        assert partial is not None
        assert partial.token_ids == TEXT[: len(partial.token_ids)] != []
        assert partial.stats.num_rounds == 3

    def test_that_of_the_call_and_that_of_the_conversation_are_one(self):
        """gRPC ends the stream a moment before the conversation's own time is over, or it does not."""
        world = World()
        fail_requests(world, Link.TARGET, dict.fromkeys(range(3, 100), grpc.StatusCode.DEADLINE_EXCEEDED))
        fail = world.on_arrival
        world.on_arrival = lambda stream, message: (
            setattr(world, "now", max(world.now, 1004.999)),
            fail(stream, message),
        )
        with pytest.raises(DeadlineExceededError) as caught:
            run(world, method="autoregressive", timeout=5.0)
        assert caught.value.partial is not None
        assert world.now - 1000 == pytest.approx(5.0)

    def test_it_ends_a_pause_between_retries(self):
        world = World()
        fail_requests(world, Link.TARGET, dict.fromkeys(range(1, 100), grpc.StatusCode.UNAVAILABLE))
        with pytest.raises(DeadlineExceededError):
            run(world, timeout=2.5)
        assert world.now - 1000 == pytest.approx(2.5)

    def test_it_ends_the_wait_for_a_frozen_draft(self):
        world = World()
        world.draft_is_frozen = True
        with pytest.raises(DeadlineExceededError):
            run(world, timeout=1.5, patience=Patience(draft_wait_s=60.0))
        assert world.now - 1000 == pytest.approx(1.5)

    def test_a_text_that_ends_before_it_is_whole(self):
        assert run(timeout=0.5).token_ids == TEXT


class TestBeginning:
    """A caller's arguments against what the target says of itself."""

    INFO = model_info(context_length=20)
    INFO.eos_token_ids.append(TEXT[6])

    def begin(self, prompt=toys.PROMPT_IDS, sampling: SamplingParams | None = None, draft="draft:1", **speculation):
        settings, speculation = ConnectionSettings("target:1", draft), {"rule": "rejection"} | speculation
        request = request_of(settings, prompt, sampling, SpeculationParams(**speculation))
        return begin_conversation(settings, PairSpeeds(), Target(self.INFO, None), request)

    @pytest.mark.parametrize("num_speculative_tokens", EVERY_K)
    def test_the_targets_context_ends_the_text(self, num_speculative_tokens):
        """A context of 20 and a prompt of 3 leave 17 tokens, whatever was asked for and however long the runs are."""
        sampling = SamplingParams(seed=11, max_new_tokens=1000, ignore_eos=True)
        result, _ = World().run(self.begin(sampling=sampling, num_speculative_tokens=num_speculative_tokens))
        assert (result.token_ids, result.finish_reason) == (TEXT[:17], "length")

    def test_the_targets_end_of_sequence_ends_the_text_unless_ignored(self):
        result, _ = World().run(self.begin(sampling=SamplingParams(seed=11)))
        assert (result.token_ids, result.finish_reason) == (TEXT[: TEXT.index(TEXT[6]) + 1], "stop")
        ignoring = SamplingParams(seed=11, max_new_tokens=12, ignore_eos=True)
        assert World().run(self.begin(sampling=ignoring))[0].token_ids == TEXT[:12]

    def test_the_seed_that_was_drawn_is_reported_and_gives_the_text_again(self):
        sampling = SamplingParams(max_new_tokens=9, ignore_eos=True)
        drawn, _ = World().run(
            self.begin(sampling=sampling, num_speculative_tokens=4)
        )  # auto may have rounds with K = 0
        again = SamplingParams(seed=drawn.seed, max_new_tokens=9, ignore_eos=True)
        assert World(5).run(self.begin(sampling=again, num_speculative_tokens=2))[0].token_ids == drawn.token_ids

    def test_words_reach_the_services_as_ids_of_the_targets_tokenizer(self):
        """The tokenizer is of pieces that are words: a, b, c."""
        pieces = {"a": 0, "b": 1, "c": 2}
        tokenizer = TargetTokenizer(Tokenizer(models.WordLevel(pieces, unk_token="c")), "", {})
        tokenizer.tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        settings, sampling = ConnectionSettings("target:1"), SamplingParams(bad_words=["a b", [7]], max_new_tokens=5)
        request = request_of(settings, [1], sampling, SpeculationParams(method="autoregressive"))
        conversation = begin_conversation(settings, PairSpeeds(), Target(self.INFO, tokenizer), request)
        opened = next(conversation.run()).message.open
        assert [[*word.token_ids] for word in opened.sampling.bad_words] == [[0, 1], [7]]

    @pytest.mark.parametrize("min_tokens", [0, 4])
    def test_min_tokens_holds_back_stop_strings(self, min_tokens):
        """The tokenizer has one letter for each id, and that of the text's second token is the stop string."""
        letters = "abcdefghijklmnopqrstuvwxyz"[: toys.VOCAB_SIZE]
        tokenizer = TargetTokenizer(Tokenizer(models.BPE({it: index for index, it in enumerate(letters)}, [])), "", {})
        tokenizer.tokenizer.decoder = decoders.Fuse()
        stop, length = letters[TARGET_ONLY_TEXT[1]], TARGET_ONLY_TEXT.index(TARGET_ONLY_TEXT[1], min_tokens) + 1
        sampling = SamplingParams(seed=11, max_new_tokens=17, ignore_eos=True, stop=[stop], min_tokens=min_tokens)
        settings = ConnectionSettings("target:1")
        speculation = SpeculationParams(method="autoregressive", rule="rejection")
        request = request_of(settings, toys.PROMPT_IDS, sampling, speculation)
        conversation = begin_conversation(settings, PairSpeeds(), Target(model_info(20), tokenizer), request)
        result, _ = World().run(conversation)
        assert (result.token_ids, result.finish_reason) == (TARGET_ONLY_TEXT[:length], "stop")
        assert result.text == "".join(letters[token_id] for token_id in result.token_ids[:-1])

    @pytest.mark.parametrize("method", ["speculative", "draft"])
    @pytest.mark.parametrize("asked", [
        {"logit_bias": {toys.VOCAB_SIZE: 1.0}}, {"allowed_token_ids": [1, toys.VOCAB_SIZE]},
        {"bad_words": [[toys.VOCAB_SIZE, 1]]}, {"stop_token_ids": [toys.VOCAB_SIZE]},
    ], ids=str)  # fmt: skip
    def test_ids_that_the_target_does_not_have_are_refused_before_anything_is_sent(self, asked, method):
        [name] = asked
        with pytest.raises(InvalidRequestError, match=rf"^{name} is {toys.VOCAB_SIZE}: .*{toys.VOCAB_SIZE}"):
            self.begin(sampling=SamplingParams(**asked), method=method)

    @pytest.mark.parametrize(
        ("arguments", "reason"),
        [
            ({"prompt": [1] * 20}, "prompt has 20 tokens: the target's context has 20"),
            ({"prompt": []}, "prompt is empty"),
            ({"prompt": [1, toys.VOCAB_SIZE]}, f"prompt holds id {toys.VOCAB_SIZE}"),
            ({"prompt": "text"}, "the target model came without a tokenizer"),
            ({"draft": None}, "method 'speculative' needs a draft"),
            ({"draft": None, "method": "draft"}, "method 'draft' needs a draft"),
            ({"sampling": SamplingParams(stop="end")}, "stop needs a tokenizer"),
            ({"sampling": SamplingParams(bad_words=["a"])}, "bad_words holds text, but the target model came without"),
        ],
        ids=["prompt_too_long", "empty", "unknown_id", "text", "no_draft", "no_draft_draft_only", "stop", "words"],
    )
    def test_what_cannot_be_done_is_refused_before_anything_is_sent(self, arguments, reason):
        with pytest.raises(InvalidRequestError, match=reason):
            self.begin(**arguments)

    def test_a_prompt_that_leaves_room_for_one_token_gets_it(self):
        result, _ = World().run(self.begin(prompt=[1] * 19, sampling=SamplingParams(ignore_eos=True)))
        assert (len(result.token_ids), result.finish_reason) == (1, "length")

    @pytest.mark.parametrize("speculation", [{"method": "autoregressive"}, {"num_speculative_tokens": 0}])
    def test_target_only_needs_no_draft(self, speculation):
        sampling = SamplingParams(seed=11, max_new_tokens=9, ignore_eos=True)
        result, _ = World().run(self.begin(sampling=sampling, draft=None, **speculation))
        assert result.token_ids == TARGET_ONLY_TEXT[:9]


class TestTime:
    def test_waits_and_total_add_up(self):
        """A frozen draft takes 2 s, a retry 3 s; the caller's own time between chunks is nobody's."""
        world = World()
        world.draft_is_frozen = True
        fail_requests(world, Link.TARGET, {2: grpc.StatusCode.UNAVAILABLE}, retry_delay_s=3.0)
        conversation = make_conversation(world)
        result = run_slowly(world, conversation, seconds_per_chunk=10.0)
        stats = result.stats
        assert stats.draft_wait_s == pytest.approx(2.0)
        assert stats.total_s == pytest.approx(5.0)
        assert stats.first_token_s == pytest.approx(2.0)

    def test_the_services_own_times_are_summed(self):
        def stamp(stream, message):
            if stream.link is Link.TARGET:
                message.timing.queue_ms, message.timing.forward_ms = 2.0, 5.0

        world = World()
        world.on_response = stamp
        stats = run(world).stats
        assert stats.target_queue_s == pytest.approx(0.002 * stats.num_rounds)
        assert stats.target_forward_s == pytest.approx(0.005 * stats.num_rounds)


def run_slowly(world: World, conversation: Conversation, seconds_per_chunk: float) -> GenerationResult:
    """Run a conversation whose caller keeps every chunk for a while."""
    chunk_given = False
    steps = conversation.run()

    class Slow:
        def run(self):
            nonlocal chunk_given
            answer = None
            while True:
                try:
                    effect = steps.send(answer)
                except StopIteration as stop:
                    return stop.value
                answer = yield effect
                if isinstance(effect, Chunk):
                    world.now += seconds_per_chunk

    return world.run(Slow())[0]  # type: ignore[arg-type]
