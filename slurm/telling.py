"""Who is told of a night, and how; a channel that fails is noted and changes nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from email.message import EmailMessage

from job.common.errors import InputError, first_line
from job.common.files import write_atomic
from job.nightly.record import NightFolder

_SECONDS = 20
_SENDMAIL = "/usr/sbin:/usr/lib:/usr/bin"  # where it lies, and cron's PATH does not reach


@dataclass(frozen=True)
class Channels:
    webhook: str | None = None
    mail: str | None = None


def tell(night: NightFolder, channels: Channels) -> None:
    """Tell of a judged night, or of one that could not be judged; told.json says how that went."""
    try:
        verdict = night.night().verdict.value
        text = (night.path / "summary.md").read_text(encoding="utf-8")
    except (InputError, OSError) as error:
        verdict, text = "incomplete", f"# {night.path.name} could not be judged\n\n{error}\n"
    title = text.partition("\n")[0].removeprefix("# ")
    told = {}
    if channels.webhook is not None:
        content = {"text": title, "verdict": verdict, "summary": text, "folder": str(night.path)}
        told["webhook"] = _tried(lambda: _post(str(channels.webhook), content))
    if channels.mail is not None:
        told["mail"] = _tried(lambda: _send(str(channels.mail), title, text))
    for channel, problem in told.items():
        print(f"{channel}: {problem or 'told'}", flush=True)
    write_atomic(night.path / "told.json", json.dumps(told, indent=2) + "\n")


def _tried(channel: Callable[[], None]) -> str | None:
    """What went wrong, if anything."""
    try:
        channel()
    except Exception as error:
        return first_line(error, named=True)
    return None


def _post(url: str, content: dict[str, str]) -> None:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(content).encode(), headers)
    with urllib.request.urlopen(request, timeout=_SECONDS):
        pass


def _send(address: str, title: str, text: str) -> None:
    program = shutil.which("sendmail") or shutil.which("sendmail", path=_SENDMAIL)
    if program is None:
        raise FileNotFoundError("there is no sendmail on this machine")
    message = EmailMessage()
    message["To"], message["Subject"] = address, title
    message.set_content(text)
    subprocess.run([program, "-i", "-t"], input=message.as_bytes(), check=True, timeout=_SECONDS)
