"""Services that break, refuse, hang or break the protocol, at any moment: what becomes of the text.

Against the toy services, as in test_conversation.
"""

from __future__ import annotations

from itertools import pairwise

import grpc
import pytest

from outrider.protocol import wire
from outrider.v1 import draft_pb2
from outrider_client.conversation.effects import BROKEN_LINK, COME_AGAIN, Describe, Link, Wait
from outrider_client.conversation.patience import Patience
from outrider_client.errors import (
    IncompatiblePairError,
    InvalidRequestError,
    ModelChangedError,
    ServiceFailedError,
    ServiceUnavailableError,
)
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
    pause_each_round,
    run,
)


class TestTargetFails:
    """The session is opened anew with all committed tokens, the round sent again, and the text is the same."""

    @pytest.mark.parametrize("code", [*COME_AGAIN, *BROKEN_LINK])
    @pytest.mark.parametrize("after_answer", [False, True], ids=["request_lost", "answer_lost"])
    @pytest.mark.parametrize("method", ["speculative", "autoregressive"])
    def test_once_the_text_is_the_same_to_the_letter(self, code, after_answer, method):
        world = World()
        fail_requests(world, Link.TARGET, {3: code}, after_answer)
        result = run(world, method=method)
        assert result.token_ids == (TARGET_ONLY_TEXT if method == "autoregressive" else TEXT)
        assert world.num_opened[Link.TARGET] == 2
        assert result.stats.num_target_retries == 1

    def test_again_and_again_the_text_is_the_same_to_the_letter(self):
        world = World()
        fail_requests(world, Link.TARGET, dict.fromkeys([1, 2, 4, 7, 8, 9], grpc.StatusCode.UNAVAILABLE))
        result = run(world)
        assert result.token_ids == TEXT
        assert result.stats.num_target_retries == 6

    def test_every_new_session_begins_with_all_committed_tokens(self):
        world = World()
        opened = []

        def break_stream(stream, message):
            if stream.link is Link.TARGET and message.HasField("open"):
                opened.append(len(message.open.committed.token_ids) // 4)
            elif stream.link is Link.TARGET and len(opened) < 3 and message.round.committed.start_position > 6:
                stream.end(grpc.StatusCode.UNAVAILABLE)

        world.on_arrival = break_stream
        assert run(world).token_ids == TEXT
        assert opened[0] == len(toys.PROMPT_IDS)
        assert opened[1] == opened[2] > 6

    @pytest.mark.parametrize("code", COME_AGAIN)
    def test_a_service_that_says_why_is_asked_again_too(self, code):
        world = World()
        fail_requests(world, Link.TARGET, {3: code}, reason="A_REASON")
        assert run(world).token_ids == TEXT

    @pytest.mark.parametrize("jitter", [0.0, 0.5])
    def test_the_first_retry_has_no_pause_and_later_ones_double_up_to_the_longest(self, jitter):
        world = World()
        fail_requests(world, Link.TARGET, dict.fromkeys(range(1, 9), grpc.StatusCode.UNAVAILABLE))
        times = []
        keep = world.on_arrival
        world.on_arrival = lambda stream, message: (
            times.append(world.now) if stream.link is Link.TARGET and message.HasField("round") else None,
            keep(stream, message),
        )
        patience = Patience(first_backoff_s=0.5, longest_backoff_s=4.0)
        run(world, method="autoregressive", patience=patience, jitter=jitter)
        pauses = [later - earlier for earlier, later in pairwise(times)]
        expected = [0.0, 0.5, 1.0, 2.0, 4.0, 4.0, 4.0, 4.0]
        assert pauses[:8] == pytest.approx([pause * (1 - jitter / 2) for pause in expected])

    def test_it_is_asked_again_when_it_says_so(self):
        world = World()
        fail_requests(world, Link.TARGET, {2: grpc.StatusCode.RESOURCE_EXHAUSTED}, retry_delay_s=3.0)
        assert run(world, method="autoregressive").token_ids == TARGET_ONLY_TEXT
        assert world.now - 1000 == pytest.approx(3.0)

    @pytest.mark.parametrize(("delay", "pauses"), [(-5.0, [0.0, 0.1, 0.1]), (0.0, [0.0, 0.1, 0.1]), (1e9, [5.0] * 3)])
    def test_an_absurd_delay_is_kept_within_bounds(self, delay, pauses):
        world = World()
        fail_requests(
            world, Link.TARGET, dict.fromkeys([2, 3, 4], grpc.StatusCode.RESOURCE_EXHAUSTED), retry_delay_s=delay
        )
        assert run(world, method="autoregressive", jitter=0.0).token_ids == TARGET_ONLY_TEXT
        assert world.now - 1000 == pytest.approx(sum(pauses))

    def test_a_delay_is_never_cut_by_jitter(self):
        world = World()
        fail_requests(world, Link.TARGET, {2: grpc.StatusCode.RESOURCE_EXHAUSTED}, retry_delay_s=3.0)
        assert run(world, method="autoregressive", jitter=0.9).token_ids == TARGET_ONLY_TEXT
        assert world.now - 1000 == pytest.approx(3.0 * 1.45)

    def test_a_failed_precondition_is_repaired_at_once(self):
        world = World()
        fail_requests(world, Link.TARGET, {2: grpc.StatusCode.FAILED_PRECONDITION})
        assert run(world, method="autoregressive").token_ids == TARGET_ONLY_TEXT
        assert world.now == 1000

    def test_failures_between_rounds_are_noticed(self):
        """The stream breaks while the conversation waits for the draft, which it goes on to do."""
        world = World(draft_speed=0.01)

        def break_target():
            stream = world.streams.get(Link.TARGET)
            if stream and not stream.is_dead and world.num_opened[Link.TARGET] < 4 and not stream.to_service:
                stream.end(grpc.StatusCode.UNAVAILABLE)

        world.on_wait = break_target
        result = run(world)
        assert result.token_ids == TEXT
        assert result.stats.num_rounds_without_draft == 0
        assert world.num_opened[Link.TARGET] == 4
        SeedText().check(result, world)

    def test_beyond_the_retry_time_it_is_unavailable_and_the_partial_text_is_kept(self):
        world = World()
        fail_requests(world, Link.TARGET, dict.fromkeys(range(6, 1000), grpc.StatusCode.UNAVAILABLE))
        with pytest.raises(ServiceUnavailableError, match=r"did not answer for 9 s \(UNAVAILABLE\)") as caught:
            run(world, patience=Patience(retry_s=9.0))
        partial = caught.value.partial
        assert partial is not None
        assert 5 <= len(partial.token_ids) < NUM_TOKENS
        assert partial.token_ids == TEXT[: len(partial.token_ids)]
        assert partial.finish_reason is None
        assert 9 - Patience().longest_backoff_s <= world.now - 1000 <= 9

    def test_the_retry_time_begins_anew_with_every_answer(self):
        """Every second request fails: 24 pauses of 1 s exceed the retry time of 2 s, but none follows another."""
        world = World()
        failures = dict.fromkeys(range(1, 49, 2), grpc.StatusCode.UNAVAILABLE)
        fail_requests(world, Link.TARGET, failures, retry_delay_s=1.0)
        patience = Patience(retry_s=2.0)
        assert run(world, method="autoregressive", patience=patience).token_ids == TARGET_ONLY_TEXT
        assert world.now - 1000 == pytest.approx(24.0)

    @pytest.mark.parametrize(
        ("code", "reason", "error", "message"),
        [
            (
                grpc.StatusCode.INVALID_ARGUMENT,
                "INVALID_FIELD",
                InvalidRequestError,
                "refused the request: as the test",
            ),
            (grpc.StatusCode.INVALID_ARGUMENT, None, InvalidRequestError, "refused the request"),
            (grpc.StatusCode.OUT_OF_RANGE, None, InvalidRequestError, "refused the request"),
            (grpc.StatusCode.UNIMPLEMENTED, None, InvalidRequestError, "no such service of this version"),
            (grpc.StatusCode.INTERNAL, "MODEL_FAILED", ServiceFailedError, r"failed \(INTERNAL\): as the test"),
            (grpc.StatusCode.PERMISSION_DENIED, None, ServiceFailedError, "wants to know who asks"),
            (grpc.StatusCode.UNAUTHENTICATED, None, ServiceFailedError, "wants to know who asks"),
            (grpc.StatusCode.NOT_FOUND, None, ServiceFailedError, "NOT_FOUND"),
            (grpc.StatusCode.ALREADY_EXISTS, None, ServiceFailedError, "ALREADY_EXISTS"),
        ],
    )
    def test_other_codes_are_final_and_keep_the_partial_text(self, code, reason, error, message):
        world = World()
        fail_requests(world, Link.TARGET, {3: code}, reason=reason)
        with pytest.raises(error, match=message) as caught:
            run(world)
        assert caught.value.partial is not None
        assert caught.value.partial.token_ids == TEXT[: len(caught.value.partial.token_ids)] != []
        assert world.num_opened[Link.TARGET] == 1

    def test_a_cache_that_differs_is_counted_and_the_session_opened_anew(self):
        world = World()
        num_answers = 0

        def corrupt(stream, message):
            nonlocal num_answers
            if stream.link is Link.TARGET:
                num_answers += 1
                if num_answers in (2, 5):
                    message.cache.digest ^= 1

        world.on_response = corrupt
        result = run(world)
        assert result.token_ids == TEXT
        assert result.stats.num_cache_mismatches == result.stats.num_target_retries == 2
        assert world.num_opened[Link.TARGET] == 3

    def test_a_session_given_up_may_break_during_the_pause(self):
        """Two mismatches in a row make a pause, in which the old stream's own end comes: it is not that of the next."""
        world = World()
        num_answers = 0

        def corrupt(stream, message):
            nonlocal num_answers
            num_answers += stream.link is Link.TARGET
            if stream.link is Link.TARGET and num_answers in (3, 4):
                message.cache.digest ^= 1
                if num_answers == 4:
                    world.on_wait = lambda: stream.is_dead or stream.end(grpc.StatusCode.INTERNAL)

        world.on_response = corrupt
        result = run(world, method="autoregressive")
        assert result.token_ids == TARGET_ONLY_TEXT
        assert (result.stats.num_cache_mismatches, world.num_opened[Link.TARGET]) == (2, 3)

    def test_a_cache_longer_than_the_text_is_a_mismatch(self):
        world = World()

        def corrupt(stream, message):
            if stream.link is Link.TARGET and world.num_opened[Link.TARGET] == 1:
                message.cache.num_cached_tokens += 50

        world.on_response = corrupt
        result = run(world)
        assert result.token_ids == TEXT
        assert result.stats.num_cache_mismatches == 1

    def test_a_service_without_caches_is_right(self):
        """`--no-kv-cache`: no token is cached after a round, and the digest of none is 0."""
        world = World()

        def clear(stream, message):
            message.cache.num_cached_tokens = message.cache.digest = 0

        world.on_response = clear
        result = run(world)
        assert result.token_ids == TEXT
        assert result.stats.num_cache_mismatches == 0

    def test_an_idle_session_is_opened_again_without_a_word(self):
        world = World()
        fail_requests(world, Link.TARGET, {3: grpc.StatusCode.FAILED_PRECONDITION}, reason="SESSION_IDLE")
        result = run(world)
        assert result.token_ids == TEXT
        assert (result.stats.num_target_retries, world.num_opened[Link.TARGET]) == (0, 2)

    def test_another_model_in_its_place_ends_the_text(self):
        world = World()
        fail_requests(world, Link.TARGET, {3: grpc.StatusCode.FAILED_PRECONDITION}, reason="MODEL_CHANGED")
        with pytest.raises(ModelChangedError) as caught:
            run(world)
        assert caught.value.partial.token_ids == TEXT[: len(caught.value.partial.token_ids)] != []

    @pytest.mark.parametrize("num_hangs", [1, 2])
    def test_a_target_that_answers_no_round_is_left_and_opened_again(self, num_hangs):
        world, num_rounds = World(), 0

        def swallow(stream, message):
            nonlocal num_rounds
            is_round = stream.link is Link.TARGET and message.HasField("round")
            num_rounds += is_round
            if is_round and 4 <= num_rounds < 4 + num_hangs:
                stream.session.answer = lambda message: None  # type: ignore[method-assign]

        world.on_arrival, world.target_may_hang = swallow, True
        patience = Patience(round_s=100.0)
        if num_hangs == 1:
            result = run(world, patience=patience)
            assert result.token_ids == TEXT
            assert (result.stats.num_target_retries, world.num_opened[Link.TARGET]) == (1, 2)
        else:  # the second one is later than the retry time allows
            with pytest.raises(ServiceUnavailableError, match="did not answer a round within 10"):
                run(world, patience=patience)

    def test_an_answer_that_comes_when_it_is_waited_for_no_longer_is_none(self):
        """The second time there is a pause before the round is asked again, in which the first answer may come."""
        world, num_rounds, late = World(), 0, []

        def hold_back(stream, message):
            nonlocal num_rounds
            num_rounds += message.HasField("round")
            if message.HasField("round") and num_rounds in (4, 5):
                answer = stream.session.answer
                stream.session.answer = lambda message: late.append((stream, answer(message)))

        def note(effect):
            while late and isinstance(effect, Wait) and effect.timeout_s < 50:
                stream, answer = late.pop()
                stream.to_client.append(toys.Received(Link.TARGET, answer))

        world.on_arrival, world.on_effect, world.target_may_hang = hold_back, note, True
        patience = Patience(round_s=100.0, retry_s=1000.0)
        result = run(world, patience=patience, method="autoregressive")
        assert not late
        assert result.token_ids == TARGET_ONLY_TEXT
        assert (result.stats.num_target_retries, world.num_opened[Link.TARGET]) == (2, 3)

    def test_an_answer_that_nobody_asked_for_is_an_error(self):
        world = World()

        def twice(stream, message):
            if stream.link is Link.TARGET and message.round_index == 3:
                stream.to_client.append(toys.Received(Link.TARGET, message))

        world.on_response = twice
        with pytest.raises(ServiceFailedError, match=r"the target (sent an answer|answered round 3 instead of 4)"):
            run(world)

    @pytest.mark.parametrize(
        "change",
        [
            "round_index",
            "no_rows",
            "more_rows",
            "row_length",
            "nan_mass",
            "negative_mass",
            "no_mass",
            "too_much_mass",
            "unknown_id",
            "units_above_1",
            "units_above_1_together",
        ],
    )
    def test_an_answer_that_is_none_is_an_error(self, change):
        def spoil(stream, message):
            if stream.link is not Link.TARGET or message.round_index < 3:
                return
            if change == "round_index":
                message.round_index += 1
            elif change == "no_rows":
                del message.rows[:]
            elif change == "row_length":
                message.rows[0].support_units.append(0)
            elif change == "more_rows":
                message.rows.append(message.rows[0])
            elif change == "nan_mass":
                message.rows[0].outside_mass = float("nan")
            elif change == "negative_mass":
                message.rows[0].outside_mass = -0.5
            elif change == "no_mass":
                message.rows[0].outside_mass = 0
                message.rows[0].support_units[:] = [0] * len(message.rows[0].support_units)
            elif change == "too_much_mass":
                message.rows[0].outside_mass += 0.01
            elif change == "unknown_id":
                message.rows[0].outside_mass += 1e-6
                message.rows[0].outside_token_id = toys.VOCAB_SIZE
            elif change == "units_above_1_together":
                message.rows[0].support_units[:] = [2**17] * len(message.rows[0].support_units)
            else:
                message.rows[0].support_units[0] = 2**18 + 1

        world = World()
        world.on_response = spoil
        with pytest.raises(ServiceFailedError, match=r"the target (answered|sent)") as caught:
            run(world)
        assert caught.value.partial is not None

    @pytest.mark.parametrize("speculation", [{}, {"overlap": False}, {"num_speculative_tokens": 8}], ids=str)
    def test_a_round_that_ends_before_its_last_proposals_leaves_them_for_the_next(self, speculation):
        """As where nothing may follow some of them, which is no matter while they may be rejected."""
        world, num_cut = World(), 0

        def cut(stream, message):
            nonlocal num_cut
            if stream.link is Link.TARGET and len(message.rows) > 1:
                del message.rows[1 + message.round_index % 2 :]
                num_cut += 1

        world.on_response = cut
        result = run(world, **speculation)
        assert num_cut > 3
        assert result.token_ids == TEXT
        assert (result.stats.num_target_retries, result.stats.num_draft_failures) == (0, 0)


class TestDraftStops:
    """It may have no token to propose, where the sampling leaves it none."""

    @pytest.fixture(autouse=True)
    def stops_behind_seven_tokens(self, monkeypatch):
        draft = toys.ToyDraft.draft

        def draft_or_stop(self):
            if len(self._tokens) < 7:
                return draft(self)
            self._is_stopped = True
            return draft_pb2.ProposeResponse(
                commit_index=self._commit_index,
                start_position=len(self._tokens),
                stopped=True,
                cache=toys.cache_state(self._tokens, len(self._tokens) - 1),
            )

        monkeypatch.setattr(toys.ToyDraft, "draft", draft_or_stop)

    @pytest.mark.parametrize("num_speculative_tokens", EVERY_K)
    @pytest.mark.parametrize("overlap", [True, False])
    def test_the_target_goes_on_alone_at_once(self, overlap, num_speculative_tokens):
        world = World()
        result = run(world, overlap=overlap, num_speculative_tokens=num_speculative_tokens)
        num_drafted = 7 - len(toys.PROMPT_IDS)
        assert result.token_ids[:num_drafted] == TEXT[:num_drafted]
        SeedText().check(result, world)
        assert (world.now, result.stats.num_draft_failures) == (1000, 0)
        assert result.stats.num_rounds_without_draft == NUM_TOKENS - num_drafted

    def test_without_a_target_the_text_ends_and_says_why(self):
        with pytest.raises(
            InvalidRequestError, match=r"^the sampling parameters leave no token for position 7: "
        ) as caught:
            run(method="draft")
        assert caught.value.partial is not None
        assert len(caught.value.partial.token_ids) == 7 - len(toys.PROMPT_IDS)


class TestDraftFails:
    """The text goes on without the draft, and with it again when it is back."""

    @pytest.mark.parametrize("code", [*COME_AGAIN, *BROKEN_LINK])
    @pytest.mark.parametrize("after_answer", [False, True], ids=["request_lost", "answer_lost"])
    def test_speculation_resumes(self, code, after_answer):
        world = World(2)
        fail_requests(world, Link.DRAFT, {2: code}, after_answer)
        result = run(world, max_new_tokens=60)
        assert result.token_ids == SeedText().text(60)
        assert world.num_opened[Link.DRAFT] == 2
        assert sum(result.stats.draft_failures.values()) == result.stats.num_draft_failures == 1
        assert result.stats.num_rounds_without_draft == 0  # it is asked again at once, and waited for

    def test_a_second_break_makes_a_pause_without_it(self):
        world = World(2)
        fail_requests(world, Link.DRAFT, {2: grpc.StatusCode.UNAVAILABLE, 3: grpc.StatusCode.UNAVAILABLE})
        pause_each_round(world, 0.02)
        result = run(world, max_new_tokens=60)
        SeedText().check(result, world)
        stats = result.stats
        assert stats.draft_failures == {"UNAVAILABLE": 2}
        assert 0 < stats.num_rounds_without_draft < stats.num_rounds
        assert list(world.num_proposals_at.values())[-1] > 0

    def test_what_it_had_proposed_is_still_used(self):
        """It breaks when it has filled its window of 10: the proposals stand, and rounds go on with them."""
        world = World(draft_speed=1000.0)
        num_drafted = 0

        def break_draft(stream, message):
            nonlocal num_drafted
            if stream.link is Link.DRAFT:
                num_drafted += len(message.proposals)
            elif world.num_opened[Link.DRAFT] == 1 and not world.streams[Link.DRAFT].is_dead:
                world.streams[Link.DRAFT].end(grpc.StatusCode.UNAVAILABLE)

        world.on_response = break_draft
        result = run(world)
        SeedText().check(result, world)
        assert num_drafted > 10
        assert world.num_opened[Link.DRAFT] == 2  # once they are used
        assert next(iter(world.num_proposals_at.values())) == 5

    def test_a_draft_that_was_never_there_costs_no_wait(self):
        world = World()
        world.draft_info = None
        result = run(world)
        assert result.token_ids == TARGET_ONLY_TEXT
        assert world.now == 1000
        assert world.num_opened[Link.DRAFT] == 0
        assert result.stats.num_rounds_without_draft == NUM_TOKENS

    def test_a_draft_that_comes_later_is_used_from_then_on(self):
        world = World()
        world.draft_info = None
        pause_each_round(world, 0.05)
        keep = world.on_wait

        def appear():
            keep()
            if len(world.num_proposals_at) == 8:
                world.draft_info = model_info()

        world.on_wait = appear
        result = run(world, max_new_tokens=60)
        SeedText().check(result, world)
        assert list(world.num_proposals_at.values())[:8] == [0] * 8
        assert list(world.num_proposals_at.values())[-1] > 0

    def test_a_frozen_draft_is_waited_for_once(self):
        world = World()
        world.draft_is_frozen = True
        result = run(world, patience=Patience(draft_wait_s=2.0))
        assert result.token_ids == TARGET_ONLY_TEXT
        assert world.now - 1000 == pytest.approx(2.0)
        assert result.stats.num_rounds_without_draft == NUM_TOKENS
        assert result.stats.num_draft_failures == 1
        assert result.stats.draft_wait_s == pytest.approx(2.0)

    def test_a_draft_that_thaws_is_used_again(self):
        world = World()
        world.draft_is_frozen = True

        def thaw():
            world.draft_is_frozen = len(world.num_proposals_at) < 10

        world.on_wait = thaw
        result = run(world, max_new_tokens=60)
        SeedText().check(result, world)
        assert 10 <= result.stats.num_rounds_without_draft < result.stats.num_rounds
        assert world.num_opened[Link.DRAFT] == 1

    @pytest.mark.parametrize("num_rounds", [3, 40, 300])
    def test_a_draft_that_froze_with_proposals_in_flight_is_understood_when_it_thaws(self, num_rounds):
        """What it had proposed by then was overruled long ago; commits have piled up on the way to it."""
        world = World(draft_speed=1000.0)
        world.draft_info = model_info(context_length=2000)

        def freeze():
            world.draft_is_frozen = 1 <= len(world.num_proposals_at) < num_rounds
            stream = world.streams.get(Link.DRAFT)
            if stream is not None and world.draft_is_frozen:
                held_back.extend(stream.to_client)
                stream.to_client.clear()
            elif stream is not None and held_back:
                stream.to_client.extendleft(reversed(held_back))
                held_back.clear()

        held_back: list = []
        world.on_wait = freeze
        result = run(world, max_new_tokens=num_rounds + 100, context_length=2000)
        SeedText().check(result, world)
        assert list(world.num_proposals_at.values())[-1] > 0
        assert result.stats.num_cache_mismatches == 0

    def test_a_cache_that_differs_is_counted_and_the_draft_opened_anew(self):
        world = World()
        num_responses = 0

        def corrupt(stream, message):
            nonlocal num_responses
            if stream.link is Link.DRAFT:
                num_responses += 1
                if num_responses == 4:
                    message.cache.digest ^= 1

        world.on_response = corrupt
        pause_each_round(world, 0.05)
        result = run(world)
        SeedText().check(result, world)
        assert result.stats.num_cache_mismatches == 1
        assert world.num_opened[Link.DRAFT] == 2

    @pytest.mark.parametrize("code", [grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED])
    def test_a_draft_that_refuses_everything_is_done_without(self, code):
        world = World()
        world.on_arrival = lambda stream, message: stream.link is Link.DRAFT and stream.end(code)
        result = run(world)
        assert result.token_ids == TARGET_ONLY_TEXT
        assert result.stats.draft_failures == {code.name: 2}  # time stands still, and a pause does not end
        with pytest.raises(ServiceFailedError, match=f"the draft refused the request .{code.name}"):
            run(world, method="draft")

    def test_a_draft_of_another_family_is_done_without_and_refused_under_the_method_draft(self):
        world = World()
        world.draft_info = model_info()
        world.draft_info.tokenizer.num_pieces += 1
        result = run(world)
        assert result.token_ids == TARGET_ONLY_TEXT
        assert result.stats.draft_failures == {"OTHER_TOKENIZER": 2}
        assert "have different tokenizers" in result.stats.first_draft_failure
        with pytest.raises(IncompatiblePairError) as caught:
            run(world, method="draft")
        assert caught.value.partial is not None

    @pytest.mark.parametrize("retry_delay_s", [-5.0, 1e9])
    def test_a_retry_delay_is_believed_within_bounds(self, retry_delay_s):
        world = World(2)
        fail_requests(world, Link.DRAFT, {1: grpc.StatusCode.RESOURCE_EXHAUSTED}, retry_delay_s=retry_delay_s)
        pause_each_round(world, 0.05)
        result = run(world, max_new_tokens=180)
        SeedText().check(result, world)
        assert list(world.num_proposals_at.values())[-1] > 0

    def test_a_draft_that_trickles_is_paused_for_ten_times_what_it_cost(self):
        """It speaks after each wait that ran out, and so ends its trial each time."""
        world = World()
        world.draft_is_frozen = True
        silences: list[float] = []

        def trickle():
            waits = round((world.now - 1000) / 2)  # waits for it that ran out
            world.draft_is_frozen = len(silences) == waits
            if not world.draft_is_frozen and any(item for item in world.streams if item is Link.DRAFT):
                silences.append(world.now)

        world.on_wait = trickle
        result = run(world, rule="shared_noise", max_new_tokens=150, num_speculative_tokens=8)
        assert len(result.token_ids) == 150
        assert world.now - 1000 <= 4.0  # two waits, and a pause that does not end within this text

    def test_all_texts_of_a_client_pause_a_dead_draft(self):
        patience, asked = Patience(), []
        breaker = patience.breaker()
        for _ in range(10):
            world = World()
            world.draft_info = None
            world.on_effect = lambda effect: asked.append(effect) if isinstance(effect, Describe) else None
            conversation = make_conversation(world, breaker=breaker)
            assert world.run(conversation)[0].token_ids == TARGET_ONLY_TEXT
        assert len(asked) == 2

    def test_a_text_that_it_fails_on_does_not_keep_it_from_others(self):
        breaker = Patience().breaker()
        for num_failures in (2, 0):
            world = World()
            if num_failures:
                world.on_arrival = lambda stream, message: (
                    stream.end(grpc.StatusCode.INVALID_ARGUMENT) if stream.link is Link.DRAFT else None
                )
            stats = world.run(make_conversation(world, breaker=breaker))[0].stats
            assert stats.num_draft_failures == num_failures
        assert stats.num_rounds_without_draft == 0

    def test_an_idle_stream_is_opened_again_without_a_word(self):
        world, num_requests = World(2), 0

        def end_idle(stream, message):
            nonlocal num_requests
            num_requests += stream.link is Link.DRAFT
            if stream.link is Link.DRAFT and num_requests == 4:
                stream.end(grpc.StatusCode.FAILED_PRECONDITION, reason="SESSION_IDLE")

        world.on_arrival = end_idle
        result = run(world)
        assert result.token_ids == TEXT
        assert world.num_opened[Link.DRAFT] == 2
        assert result.stats.draft_failures == {}

    @pytest.mark.parametrize("num_speculative_tokens", EVERY_K)
    def test_beyond_its_context_the_target_goes_on_without_it(self, num_speculative_tokens):
        """A context of 15 holds the prompt of 3 and 12 tokens: proposals up to there, then none."""
        world = World()
        world.draft_info = model_info(context_length=15)
        result = run(world, num_speculative_tokens=num_speculative_tokens)
        SeedText().check(result, world)
        assert result.token_ids[:12] == TEXT[:12]
        assert all((count == 0) == (position >= 15) for position, count in world.num_proposals_at.items())
        assert world.num_timeouts == 0

    def test_behind_a_token_it_does_not_know_the_target_goes_on_without_it(self):
        """The draft's vocabulary lacks the last id, which the target says sooner or later."""
        last_id = toys.VOCAB_SIZE - 1
        world = World()
        world.draft_info = model_info(vocab_size=last_id)
        result = run(world, max_new_tokens=60)
        assert last_id in result.token_ids
        end = len(toys.PROMPT_IDS) + result.token_ids.index(last_id)
        assert all(count == 0 for position, count in world.num_proposals_at.items() if position > end)
        assert world.num_timeouts == 0

    @pytest.mark.parametrize(
        "change",
        [
            "position",
            "token_id",
            "unknown_id",
            "far_unknown_id",
            "no_support",
            "more_gaps",
            "more_weights",
            "no_weight",
        ],
    )
    @pytest.mark.parametrize("method", ["speculative", "draft"])
    def test_a_proposal_that_is_none_is_a_failure(self, change, method):
        def spoil(stream, message):
            if stream.link is not Link.DRAFT or not message.proposals:
                return
            proposal = message.proposals[0]
            index = wire.support_of(proposal.support_gaps, "gaps", toys.VOCAB_SIZE).tolist().index(proposal.token_id)
            if change == "position":
                message.start_position += 3
            elif change == "token_id":
                proposal.token_id = toys.VOCAB_SIZE + 1
            elif change == "unknown_id":
                proposal.support_gaps.append(toys.VOCAB_SIZE)
                proposal.support_weights.append(1)
            elif change == "far_unknown_id":  # in 32 bits, the sum would be the token again
                proposal.support_gaps.extend([2**32 - 1, 2**32 - 1])
                proposal.support_weights.extend([1, 1])
            elif change == "no_support":
                del proposal.support_gaps[:]
                del proposal.support_weights[:]
            elif change == "more_gaps":
                del proposal.support_weights[-1]
            elif change == "more_weights":
                proposal.support_weights.append(1)
            else:
                proposal.support_weights[index] = 0

        world = World()
        world.on_response = spoil
        if method == "draft":
            with pytest.raises(ServiceFailedError, match=r"the draft (proposed|sent)"):
                run(world, method="draft")
            return
        result = run(world)
        assert result.token_ids == TARGET_ONLY_TEXT
        assert result.stats.draft_failures.keys() == {"BROKE_PROTOCOL"}
