from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from cli.errors import PortInUseError, StateFolderError
from cli.stack import port, redis_server, state
from cli.stack.log import FileLog, TerminalLog


def test_state_folder_is_private_even_when_it_was_not_before(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.mkdir(mode=0o755)

    with state.hold(folder, url="http://x") as held:
        assert stat.S_IMODE(held.path.stat().st_mode) == 0o700
        assert stat.S_IMODE(held.redis_data.stat().st_mode) == 0o700


def test_second_holder_is_told_who_is_first(tmp_path: Path) -> None:
    with (
        state.hold(tmp_path, url="http://first"),
        pytest.raises(StateFolderError, match=rf"pid {os.getpid()}, http://first\); stop it"),
        state.hold(tmp_path, url="http://second"),
    ):
        pass


def test_state_folder_is_free_again_when_its_holder_is_done(tmp_path: Path) -> None:
    for _ in range(2):
        with state.hold(tmp_path, url="http://x"):
            pass


def test_state_folder_is_refused_in_words_when_it_is_a_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()

    with (
        pytest.raises(StateFolderError, match=rf"--state-dir {file}: cannot be used"),
        state.hold(file, url="http://x"),
    ):
        pass


def test_socket_moves_to_a_short_private_folder_when_its_path_is_too_long(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 30)

    with state.hold(folder, url="http://x") as held:
        assert redis_server.fits_socket_path(held.redis_socket)
        assert stat.S_IMODE(held.redis_socket.parent.stat().st_mode) == 0o700
        first = held.redis_socket
    with state.hold(folder, url="http://x") as held:
        assert held.redis_socket == first
    first.parent.rmdir()


def test_port_is_refused_with_its_option_when_it_is_taken_or_cannot_be_had() -> None:
    with pytest.raises(PortInUseError, match=r"--host 192\.0\.2\.1: cannot listen there"):
        port.check_free("192.0.2.1", 8000)
    port.check_free("127.0.0.1", port.choose_free("127.0.0.1"))


def test_terminal_log_puts_the_process_before_each_line(capsys: pytest.CaptureFixture[str]) -> None:
    log = TerminalLog(("api", "worker-10"))

    log.line("api", "ready")
    log.note("stopped")

    assert capsys.readouterr().out == "api       │ ready\nup        │ stopped\n"


def test_file_log_keeps_all_in_the_file_and_the_last_lines_at_hand(tmp_path: Path) -> None:
    log = FileLog(tmp_path / "log", num_last=2)

    for number in range(5):
        log.line("api", str(number))
    log.close()

    assert list(log.last) == ["api │ 3", "api │ 4"]
    assert len((tmp_path / "log").read_text().splitlines()) == 5
