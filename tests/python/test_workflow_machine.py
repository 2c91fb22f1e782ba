"""What holds for the rules whatever happens in whatever order."""

from __future__ import annotations

import json
from dataclasses import replace

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rmaker_ota.esp_err import EspErr
from rmaker_ota.rainmaker.types import DiagStatus, OtaStatus
from rmaker_ota.rainmaker.workflow import (
    AcceptHeader,
    Action,
    ApiReturn,
    AttemptCheckpoint,
    AttemptFailed,
    AttemptFinished,
    AttemptHeader,
    AttemptProgress,
    AttemptReceived,
    CallbackReturned,
    CallDefaultCallback,
    CallDiagnostics,
    CallFetch,
    CallFetchWithDelay,
    CallMarkInvalid,
    CallMarkValid,
    CallReportStatus,
    Connected,
    DiagnosticsReturned,
    Disconnected,
    FetchScheduled,
    ImageDescription,
    MessageReceived,
    OtaOptions,
    PubAck,
    Publish,
    QueueCallback,
    RefuseHeader,
    Restart,
    ResumePoint,
    Stage,
    StartAttempt,
    Started,
    StartTimer,
    TimerKind,
)
from rmaker_ota.targets.base import BootState
from tests.python.workflow_driver import IMAGE_SIZE, MD5, URL_TOPIC, VERSIONS, Driver, chip

JOBS = ("J1", "J2", "J3")
FINAL = ("success", "rejected", "failed")
TOPICS = {
    "$aws/rules/esp_node_otafetch/node/N1/otafetch": ["node_id", "fw_version"],
    "$aws/rules/esp_node_otastatus/node/N1/otastatus": ["ota_job_id", "status", "additional_info", "ts"],
}


class Node(RuleBasedStateMachine):
    """A node whose world does anything at any time. Boots follow one another on one store."""

    @initialize(
        callback=st.booleans(),
        diagnostics=st.booleans(),
        rollback=st.booleans(),
        state=st.sampled_from([BootState.VALID, BootState.PENDING_VERIFY, None]),
        report_failed=st.booleans(),
        test_mode=st.integers(0, 5),
    )
    def first_boot(
        self,
        callback: bool,
        diagnostics: bool,
        rollback: bool,
        state: BootState | None,
        report_failed: bool,
        test_mode: int,
    ) -> None:
        self.config = {"has_ota_callback": callback, "has_diagnostics": diagnostics}
        self.options = OtaOptions(
            rollback_enable=rollback,
            ota_progress_support=True,
            ota_rollback_report_failed=report_failed,
            ota_test_rollback=test_mode == 0,
            ota_autofetch_period_hours=test_mode % 2,
        )
        self.driver = Driver()
        self.running = "ota_0"
        self.driver.stored = {}
        self.boot(state)

    def boot(self, state: BootState | None) -> None:
        self.driver = Driver(
            self.options,
            chip(self.running, state),
            stored=self.driver.stored,
            monotonic=self.driver.monotonic,
            check=self.check,
        )
        self.state = state
        self.connected = self.started = False
        self.attempt: StartAttempt | None = None
        self.attempt_state = ""
        self.callback: QueueCallback | None = None
        self.diagnostics: CallDiagnostics | None = None
        self.open_calls: set[int] = set()
        self.new_image = False
        self.tokens: set[int] = set()
        self.finals: list[str] = []  # of the job at hand
        self.scheduled = False  # a fetch, since the job at hand began
        self.driver.enable(**self.config)

    # -- What is looked at

    def check(self, action: Action) -> None:
        match action:
            case Publish(token, topic, payload, qos):
                assert token not in self.tokens
                self.tokens.add(token)
                assert qos == 1
                message = json.loads(payload)
                assert list(message) == TOPICS[topic]
                if "status" in message and message["status"] in FINAL:
                    self.finals.append(message["additional_info"])
            case StartAttempt():
                assert self.attempt is None, "two attempts at once"
                self.attempt, self.attempt_state = action, "begun"
                assert action.resume is None or action.resume.offset >= 1024
            case AcceptHeader(attempt):
                assert self.attempt is not None
                assert (self.attempt.attempt, self.attempt_state) == (attempt, "begun")
                self.attempt_state = "accepted"
            case RefuseHeader(attempt):
                assert self.attempt is not None
                assert (self.attempt.attempt, self.attempt_state) == (attempt, "begun")
                self.attempt_state = "refused"
            case QueueCallback():
                assert self.callback is None, "two jobs at once"
                assert self.attempt is None
                assert not self.new_image, "a job over an image that waits for the restart"
                self.finals, self.scheduled = [], False
                if not action.builtin and not self.driver.queue_full:
                    self.callback = action
            case CallDiagnostics():
                assert self.diagnostics is None, "two questions at once"
                self.diagnostics = action
            case ApiReturn(call):
                self.open_calls.discard(call)
            case FetchScheduled(seconds):
                assert seconds >= 0
                self.scheduled = True
            case StartTimer(_, seconds):
                assert seconds >= 0
            case _:
                pass

    @invariant()
    def a_job_that_is_over_ended_somehow(self) -> None:
        if not hasattr(self, "driver") or self.driver.dead or self.driver.workflow.busy or self.attempt is not None:
            return
        if self.config["has_ota_callback"]:
            return  # its reports are its own business
        if self.driver.done and any(isinstance(one, QueueCallback) for one in self.driver.done):
            assert self.finals or self.scheduled, "a job ended without a word"

    # -- What happens

    def alive(self) -> bool:
        return not self.driver.dead

    @precondition(alive)
    @rule()
    def connect(self) -> None:
        self.connected = True
        self.driver.feed(Connected())
        if self.alive() and not self.started:
            self.started = True
            self.driver.feed(Started())

    @precondition(lambda self: self.alive() and self.connected)
    @rule(seconds=st.sampled_from([1, 100]))
    def disconnect(self, seconds: int) -> None:
        self.connected = False
        self.driver.feed(Disconnected())
        self.driver.monotonic += seconds

    @rule(accept=st.booleans(), error=st.sampled_from([0, 0, EspErr.OTA_ROLLBACK_FAILED]), full=st.booleans())
    def moods(self, accept: bool, error: int, full: bool) -> None:
        self.driver.accept = accept
        self.driver.target_error = error
        self.driver.queue_full = full

    @precondition(alive)
    @rule(
        job=st.sampled_from(JOBS),
        md5=st.sampled_from([None, MD5]),
        window=st.sampled_from([None, {"start": 720, "end": 730}, {"start": 0, "end": 5}, {"start": 3}]),
    )
    def message(self, job: str, md5: str | None, window: dict[str, int] | None) -> None:
        fields: dict[str, object] = {} if md5 is None else {"file_md5": md5}
        if window is not None:
            fields["metadata"] = {"download_window": window}
        self.driver.job(job, **fields)

    @precondition(alive)
    @rule(payload=st.sampled_from([b"", b"{", b"[]", b'{"ota_job_id":"J1"}', b'{"url":"u"}']))
    def garbage(self, payload: bytes) -> None:
        self.driver.feed(MessageReceived(URL_TOPIC, payload))

    @precondition(lambda self: self.alive() and self.driver.timers)
    @rule(data=st.data())
    def timer(self, data: st.DataObject) -> None:
        self.driver.fire(data.draw(st.sampled_from(sorted(self.driver.timers))))

    @precondition(lambda self: self.alive() and self.driver.unacknowledged)
    @rule(data=st.data())
    def acknowledge(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(self.driver.unacknowledged))
        self.driver.unacknowledged.remove(number)
        self.driver.feed(PubAck(number))

    @precondition(lambda self: self.alive() and self.attempt_state == "begun")
    @rule(version=st.sampled_from([*VERSIONS.values(), "3.0.0"]), project=st.sampled_from(["gw", "gw", "other"]))
    def header(self, version: str, project: str) -> None:
        assert self.attempt is not None
        offset = 0 if self.attempt.resume is None else self.attempt.resume.offset
        self.driver.feed(AttemptHeader(self.attempt.attempt, ImageDescription(project, version), offset))

    @precondition(lambda self: self.alive() and self.attempt_state == "accepted")
    @rule(done=st.integers(0, IMAGE_SIZE))
    def progress(self, done: int) -> None:
        assert self.attempt is not None
        self.driver.feed(AttemptProgress(self.attempt.attempt, done))
        if self.attempt.keep_position:
            self.driver.feed(AttemptCheckpoint(self.attempt.attempt, ResumePoint(done // 4096 * 4096, bytes(32))))

    @precondition(lambda self: self.alive() and self.attempt_state == "accepted")
    @rule()
    def received(self) -> None:
        assert self.attempt is not None
        self.attempt_state = "received"
        self.driver.feed(AttemptReceived(self.attempt.attempt, IMAGE_SIZE))
        assert self.driver.stored is not None
        assert "ota_written" not in self.driver.stored

    @precondition(lambda self: self.alive() and self.attempt_state == "received")
    @rule()
    def installed(self) -> None:
        assert self.attempt is not None
        attempt, self.attempt, self.attempt_state = self.attempt, None, ""
        self.new_image = True
        self.driver.feed(AttemptFinished(attempt.attempt, None, VERSIONS[self.driver.boot.next_slot or ""]))

    @precondition(lambda self: self.alive() and self.attempt is not None)
    @rule(stage=st.sampled_from(list(Stage)), answered=st.booleans())
    def attempt_fails(self, stage: Stage, answered: bool) -> None:
        assert self.attempt is not None
        attempt, self.attempt, self.attempt_state = self.attempt, None, ""
        self.driver.feed(AttemptFailed(attempt.attempt, stage, answered=answered))

    @precondition(lambda self: self.alive() and self.callback is not None and not self.open_calls)
    @rule(error=st.sampled_from([None, "ValueError: x"]))
    def callback_returns(self, error: str | None) -> None:
        assert self.callback is not None
        query, self.callback = self.callback, None
        self.driver.feed(CallbackReturned(query.job, error))
        if self.attempt is None:
            assert self.new_image or self.state == BootState.PENDING_VERIFY or not self.driver.workflow.busy

    @precondition(lambda self: self.alive() and self.callback is not None)
    @rule()
    def callback_calls_the_handler(self) -> None:
        assert self.callback is not None
        number = next(self.driver.calls)
        at_work = bool(self.open_calls)
        self.open_calls.add(number)
        self.driver.feed(CallDefaultCallback(number, self.callback.handle, self.callback.data))
        assert (number in self.open_calls) == (not at_work and self.attempt is not None)

    @precondition(lambda self: self.alive() and self.diagnostics is not None)
    @rule(status=st.sampled_from(list(DiagStatus)))
    def diagnosed(self, status: DiagStatus) -> None:
        assert self.diagnostics is not None
        query, self.diagnostics = self.diagnostics, None
        self.driver.feed(DiagnosticsReturned(query.token, status))

    @precondition(alive)
    @rule(what=st.sampled_from([CallFetch, CallMarkValid, CallMarkInvalid]))
    def api(self, what: type[CallFetch]) -> None:
        returned = self.driver.call(what)
        assert (returned is None) == self.driver.dead
        if what is CallMarkValid and returned == EspErr.OK:
            self.state = BootState.VALID

    @precondition(alive)
    @rule(seconds=st.sampled_from([-1, 0, 1, 10**9]))
    def fetch_later(self, seconds: int) -> None:
        returned = self.driver.call(CallFetchWithDelay, seconds)
        assert returned == (EspErr.INVALID_ARG if seconds < 0 else EspErr.OK)

    @precondition(alive)
    @rule(status=st.sampled_from(list(OtaStatus)), handle=st.sampled_from([None, 1]))
    def report(self, status: OtaStatus, handle: int | None) -> None:
        assert self.driver.call(CallReportStatus, handle, status, "text") in (
            EspErr.OK,
            EspErr.FAIL,
            EspErr.INVALID_STATE,
        )

    @rule(cut=st.booleans())
    def restart(self, cut: bool) -> None:
        """By itself or by a loss of power: the boot loader starts the new image once, the old one otherwise."""
        if self.driver.dead or cut:
            rolled_back = any(one == Restart("rollback") for one in self.driver.done)
            if self.new_image or rolled_back or (cut and self.state == BootState.PENDING_VERIFY):
                self.running = "ota_1" if self.running == "ota_0" else "ota_0"
            trial = self.new_image and self.options.rollback_enable
            self.boot(BootState.PENDING_VERIFY if trial else BootState.VALID)

    def teardown(self) -> None:
        """Left alone with a good connection, nothing stays open: every outcome is acknowledged in the end."""
        if not hasattr(self, "driver") or self.driver.dead:
            return
        self.driver.accept = True
        self.driver.target_error = 0
        if self.diagnostics is not None:
            self.diagnosed(DiagStatus.SUCCESS)
        self.driver.feed(Connected())
        if self.alive() and not self.started:
            self.driver.feed(Started())
        if self.alive() and TimerKind.RESEND in self.driver.timers:
            self.driver.fire(TimerKind.RESEND)
        for number in list(self.driver.unacknowledged):
            if self.alive():
                self.driver.feed(PubAck(number))
        if self.alive():
            assert self.driver.stored is not None
            assert "ota_result" not in self.driver.stored


TestNode = Node.TestCase
TestNode.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


def test_the_machine_reaches_the_end_of_an_update() -> None:
    """The walk above is not idle: this is one of its paths, written down."""
    node = Node()
    node.first_boot(False, False, True, BootState.VALID, False, 1)
    node.connect()
    node.message("J1", MD5, None)
    node.header("2.0.0", "gw")
    node.progress(50_000)
    node.received()
    node.installed()
    node.driver.fire(TimerKind.REBOOT)
    assert node.driver.dead
    node.restart(False)
    assert node.running == "ota_1"
    node.connect()
    assert node.finals == ["OTA Upgrade finished and verified successfully"]
    node.teardown()
    assert replace(node.driver.boot, version="2.0.0") == node.driver.boot
