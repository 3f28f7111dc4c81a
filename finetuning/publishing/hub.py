"""The Hugging Face Hub: checking before training that the result may be uploaded, and uploading it afterwards."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, validate_repo_id

from finetuning import files
from finetuning.errors import InputError, RunError
from finetuning.publishing.model_card import card_for_hub
from finetuning.publishing.private_paths import private_paths, uploaded_content
from finetuning.run_folder import CARD, VALIDATION

TIMEOUT = 10  # seconds in which the hub must answer before training
# What others can use of a run. Checkpoints, logs and whatever else lies in its folder are not uploaded.
FOLDERS = (
    "unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "vae", "tokenizer", "tokenizer_2",
    "tokenizer_3", "scheduler", "controlnet", "hint_encoder", VALIDATION,
)  # fmt: skip
ENDINGS = (".md", ".yaml", ".json", ".jsonl", ".png", ".safetensors")
MAY_WRITE = ("admin", "write", "contributor")  # roles in an organization that may write


@dataclass(frozen=True)
class HubRepository:
    """A repository on the hub into which the user may write.

    Attributes:
        name: owner/name.
        token: of the user; it is never written or printed.
    """

    name: str
    token: str = field(repr=False)

    def upload(self, run: Path) -> str:
        """Upload the result of a run, with a card that loads it from the hub.

        Paths of this machine are replaced in what is uploaded, e.g. in config.yaml, see private_paths.py.

        Args:
            run: the run's folder; its card is changed to load from the hub.

        Returns:
            The address of the repository.

        Raises:
            RunError: the upload failed. What the run has written is still in its folder.
        """
        card = run / CARD
        files.write(card, card_for_hub(card.read_text(encoding="utf-8"), run, self.name))
        private = private_paths(run)
        try:
            changes = [CommitOperationAdd(name, uploaded_content(run / name, private)) for name in uploaded_files(run)]
            HfApi(token=self.token).create_commit(self.name, changes, commit_message=f"Upload {run.resolve().name}")
        except Exception as error:
            raise RunError(
                f"{self.name}: not uploaded ({_says(error)}). The result is complete in {run}; try again with: "
                f"python scripts/push.py --run {run} --hub_model_id {self.name}"
            ) from error
        return f"{constants.ENDPOINT}/{self.name}"


def open_repository(name: str | None, token: str | None, run: Path) -> HubRepository:
    """Check that a result can be uploaded, and make the repository if it does not exist yet.

    Args:
        name: owner/name, or only the name of a repository of the user's own. None = the name of the run's folder.
        token: None = the token in HF_TOKEN, or of `hf auth login`.
        run: the run's folder.

    Raises:
        InputError: the hub cannot be reached, there is no token, the hub does not accept it, it may only read, or the
            name is not one that may be written.
    """
    name = run.resolve().name if name is None else name
    flag = f"--hub_model_id={name}"
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(f"{flag}: is no name of a repository, which is owner/name. {_says(error)}") from error
    if constants.HF_HUB_OFFLINE:
        raise InputError(
            "--push_to_hub: HF_HUB_OFFLINE is set, so that nothing can be uploaded; unset it or drop this"
        )
    token = token or get_token()
    if not token:
        raise InputError(
            "--push_to_hub: there is no token; log in with `hf auth login`, set HF_TOKEN, or give --hub_token"
        )
    user = _who_is(token)
    name = name if "/" in name else f"{user['name']}/{name}"
    if fault := permission_fault(user, name):
        raise InputError(fault)
    api = HfApi(token=token)
    try:
        api.create_repo(name, exist_ok=True)
        if "write" in inspect.signature(api.auth_check).parameters:  # not in older versions
            api.auth_check(name, write=True)
    except Exception as error:
        raise InputError(f"{flag}: this token may not write there. The hub says: {_says(error)}") from error
    return HubRepository(name, token)


def permission_fault(user: dict[str, Any], name: str) -> str | None:
    """Why a user's token may not write into a repository; None = as far as the hub's `whoami` says, it may.

    What tokens with permissions of their own ("fineGrained") may do is only found out by trying.

    Args:
        user: the answer of `whoami`; name: owner/name.
    """
    owner, role = name.split("/")[0], user.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        return "--hub_token: may only read; make one that may write at https://huggingface.co/settings/tokens"
    roles = {place["name"]: place.get("roleInOrg") for place in user.get("orgs", ())}
    if owner != user["name"] and owner not in roles:
        there = ", ".join([user["name"], *roles])
        return f"--hub_model_id={name}: the token's user is not {owner} and not in it; owners that fit: {there}"
    if roles.get(owner, "write") not in (*MAY_WRITE, None):
        return f"--hub_model_id={name}: {user['name']} may only {roles[owner]} in {owner}; choose another owner"
    return None


def uploaded_files(run: Path) -> list[str]:
    """Paths, inside a run's folder, of the files that are uploaded."""
    own = [path for path in run.iterdir() if path.is_file() and path.suffix in ENDINGS]
    parts = [path for folder in FOLDERS for path in (run / folder).rglob("*") if path.is_file()]
    return sorted(path.relative_to(run).as_posix() for path in (*own, *parts) if not path.name.startswith("."))


def _who_is(token: str) -> dict[str, Any]:
    """What the hub says of a token's user. HfApi's `whoami` has no time limit; this has.

    Raises:
        InputError: the hub cannot be reached, or does not accept the token.
    """
    try:
        answer = get_session().get(
            f"{constants.ENDPOINT}/api/whoami-v2", headers=build_hf_headers(token=token), timeout=TIMEOUT
        )
    except Exception as error:
        raise InputError(
            f"--push_to_hub: {constants.ENDPOINT} cannot be reached ({_says(error)}); check the network, or drop the "
            "flag and upload the result later by scripts/push.py"
        ) from error
    try:
        hf_raise_for_status(answer)
    except Exception as error:
        if answer.status_code in (401, 403):
            raise InputError(
                "--hub_token: the hub does not accept this token; make one at https://huggingface.co/settings/tokens"
            ) from error
        raise InputError(f"--push_to_hub: the hub does not say who the user is: {_says(error)}") from error
    return answer.json()


def _says(error: Exception) -> str:
    """The message of an error on one line, or the kind of error if it has none."""
    return " ".join(str(error).split())[:200] or type(error).__name__
