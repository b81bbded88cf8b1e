"""One table of exit codes, one order of blame, one wrapper."""

import errno
import itertools
import re
import subprocess
import sys
import threading

import pytest

from pipeline import cli, errors
from pipeline.cli import COMMANDS, guarded
from pipeline.errors import ConfigError, DistributedFailure, Interrupted, PipelineError
from pipeline.exit_codes import ExitCode, blame
from tests.conftest import ROOT


def test_every_error_has_a_code_of_its_own_and_the_docs_list_all_codes() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, PipelineError)]
    codes = [kind.exit_code for kind in kinds]
    assert len(set(codes)) == len(codes)
    table = (ROOT / "docs/exit-codes.md").read_text()
    listed = [int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)]
    assert listed == list(ExitCode)


@pytest.mark.parametrize(
    ("codes", "blamed"),
    [
        ([], 0),
        ([0, 0], 0),
        ([0, 75], 75),
        ([7, 3, 7], 3),  # a reason causes the loss of peers
        ([75, 6], 6),  # a reason comes before an interruption
        ([1, 4], 4),  # and before a bug
        ([7, 1], 1),  # a bug must not be requeued as the loss of a rank
        ([1, 75], 1),  # nor as an interruption
        ([-9, 1], 1),
        ([7, 75], 75),  # all is saved; the loss came later
        ([7, -9], -9),  # the killed rank is the cause of the loss
        ([-9, 75], 75),
        ([3, 4], 3),  # the first rank's reason counts
        ([4, 3], 4),
        ([42, 1], 42),  # an unknown code is a reason
    ],
)
def test_the_code_that_says_most_about_the_cause_is_blamed(codes: list[int], blamed: int) -> None:
    assert blame(codes) == blamed


def test_the_order_of_blame_does_not_depend_on_the_order_of_the_ranks() -> None:
    for codes in itertools.permutations([0, 7, -9, 75, 130, 1, 5]):
        assert blame(codes) == 5


def raising(error: BaseException):
    def command(arguments: list[str]) -> int:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ConfigError("lr is wrong"), 2, "error: lr is wrong\n"),
        (Interrupted("stopped"), 75, "stopped\n"),
        (OSError(errno.ENOSPC, "", "/there"), 5, "error: /there: No space left on device; free some space"),
        (
            PermissionError(errno.EACCES, "", "/there"),
            5,
            "error: /there: Permission denied; give another file or folder",
        ),
        (OSError(errno.ENAMETOOLONG, "", "y" * 5000), 5, f"error: {'y' * 200}: File name too long"),
        (KeyboardInterrupt(), 130, "stopped at once"),
    ],
)
def test_what_a_person_can_cause_ends_in_a_sentence(capsys, error: BaseException, code: int, said: str) -> None:
    assert guarded(raising(error), []) == code
    told = capsys.readouterr().err
    assert told.startswith(said)
    assert "Traceback" not in told


def test_a_bug_ends_in_1_with_its_stack_trace(capsys) -> None:
    assert guarded(raising(OSError(errno.ENOENT, "", "/there")), []) == 1
    assert "Traceback" in capsys.readouterr().err


def test_only_rank_0_tells_of_an_interruption_and_every_rank_of_an_error(capsys) -> None:
    assert guarded(raising(Interrupted("stopped")), [], rank="1") == 75
    assert capsys.readouterr().err == ""
    assert guarded(raising(ConfigError("wrong")), [], rank="1") == 2
    assert capsys.readouterr().err == "error: wrong\n"


def test_a_foreign_exception_can_be_explained(capsys) -> None:
    def explain(error: Exception) -> PipelineError | None:
        return DistributedFailure("rank 0 lost another rank") if "gloo" in str(error) else None

    assert guarded(raising(RuntimeError("gloo: gone")), [], explain=explain) == 7
    assert capsys.readouterr().err == "error: rank 0 lost another rank\n"
    assert guarded(raising(RuntimeError("other")), [], explain=explain) == 1


def test_a_full_disk_in_a_thread_is_left_to_the_main_one(capsys) -> None:
    def failing(arguments: list[str]) -> int:
        for number in (errno.ENOSPC, errno.ENOENT):
            thread = threading.Thread(target=raising(OSError(number, "words", "/there")), args=([],))
            thread.start()
            thread.join()
        return 0

    before = threading.excepthook
    assert guarded(failing, []) == 0
    assert threading.excepthook is before
    told = capsys.readouterr().err
    assert told.count("Traceback") == 1
    assert "FileNotFoundError" in told


def test_what_tensorboards_thread_cannot_write_is_left_to_the_main_one(capsys) -> None:
    kind = type(
        "_AsyncWriterThread", (threading.Thread,), {"__module__": "tensorboard.summary.writer.event_file_writer"}
    )

    def failing(arguments: list[str]) -> int:
        for error in (OSError(errno.ENOENT, "words", "/there"), ValueError("a bug")):
            thread = kind(target=raising(error), args=([],))
            thread.start()
            thread.join()
        return 0

    assert guarded(failing, []) == 0
    told = capsys.readouterr().err
    assert told.count("Traceback") == 1
    assert "a bug" in told


def test_every_command_of_vmp_names_a_module_with_a_main(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module is imported only when its command is called, and gets the words of the command."""
    for name, command in COMMANDS.items():
        path = ROOT / f"{command.module.replace('.', '/')}.py"
        assert "\ndef main(" in path.read_text(), name
    assert cli.main(["--help"]) == 0
    assert all(f"\n  {name} " in capsys.readouterr().out for name in list(COMMANDS)[:1])
    assert cli.main(["reprot"]) == 2
    assert "unknown command of vmp 'reprot'; known: report" in capsys.readouterr().err
    got: list[str] = []
    fake = type(sys)("fake_command")
    fake.main = lambda words: got.extend(words) or 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_command", fake)
    monkeypatch.setitem(COMMANDS, "chain", COMMANDS["chain"]._replace(module="fake_command"))
    assert cli.main(["chain", "demo", "run.seed=1"]) == 3
    assert got == ["local", "chain", "demo", "run.seed=1"]


def test_the_config_files_are_listed_and_copied_with_their_bases(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["configs"]) == 0
    assert "configs/arm/demo.yaml\n" in capsys.readouterr().out
    assert cli.main(["configs", "copy", "imagenet_semivit_huge", "mine"]) == 0
    found = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.yaml"))
    assert found == ["mine/semi/imagenet_semivit_base.yaml", "mine/semi/imagenet_semivit_huge.yaml"]
    assert cli.main(["configs", "copy", "imagenet_semivit_huge", "mine"]) == 2
    assert "exists already and is not overwritten" in capsys.readouterr().err
    assert cli.main(["configs", "copy", "demmo", "mine"]) == 2
    assert "no config file is called 'demmo'" in capsys.readouterr().err


def test_a_reader_that_has_read_enough_is_no_error() -> None:
    code = "from pipeline.cli import guarded; guarded(lambda _: [print(k) for k in range(10**6)] and 0, [])"
    command = f"{sys.executable} -c '{code}' | head -1"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("0\n", "")
