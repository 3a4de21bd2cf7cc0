"""Every block of the pages that somebody may copy has a test that runs it, or holds it against what it is about."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from broker.policy import Policy
from tests.support.pages import ROOT, blocks

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMED = {
    "docs/clients.md": "tests/conformance/clients/test_docs_blocks.py::test_every_block_of_the_page_has_a_test",
    "docs/operations.md": "tests/conformance/test_operations.py::test_every_block_of_the_page_has_a_test",
    "docs/ci.md": "tests/conformance/test_ci_examples.py::test_a_pipeline_keeps_to_its_schema",
    "docs/quickstart.md": "tests/conformance/test_quickstart.py::test_the_walk_does_what_the_page_says",
    "docs/policy.md": "tests/unit/test_docs.py::test_the_reference_begins_with_the_file_that_readme_shows",
    "docs/concepts.md": "tests/unit/test_docs.py::test_generated_blocks_are_what_the_code_prints",
}
"""Pages whose named blocks are taken out by name, each with the test that knows all of them."""

INSPECTED = "tests/integration/test_inspection.py"
RECIPES = "tests/integration/test_inspect_recipes.py"
SHOWN = "shown"
"""Nothing to copy: a drawing, or what a command prints."""

KNOWN: dict[str, dict[str, str]] = {
    "README.md": {
        "OpenAI clients, curl": SHOWN,
        "python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt . && .venv/bin/gateway up": (
            "tests/conformance/test_quickstart.py::test_from_a_clean_machine_the_first_line_leads_to_an_answer"
        ),
        "python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt -e '.[test]' && "
        ".venv/bin/python -m pytest -n 2": (
            "tests/unit/test_house.py::test_ci_runs_the_very_line_that_readme_tells_people_to_run"
        ),
        "from openai import OpenAI": ("tests/conformance/test_quickstart.py::test_the_walk_does_what_the_page_says"),
        "curl -N http://127.0.0.1:8400/v1/chat/completions -H 'content-type: application/json' \\": (
            "tests/conformance/test_quickstart.py::test_the_walk_does_what_the_page_says"
        ),
        "models:": "tests/unit/test_docs.py::test_the_reference_begins_with_the_file_that_readme_shows",
        "remote:": "tests/unit/test_blocks.py::test_pieces_of_a_policy_are_taken",
        "webhooks: { allow: [ci.internal, 10.20.0.0/16] }": (
            "tests/unit/test_blocks.py::test_pieces_of_a_policy_are_taken"
        ),
        "gateway init": "tests/unit/test_init.py::test_init_writes_a_file_that_check_takes",
        "gateway key new ann --admin": "tests/unit/test_cli_keys.py::test_from_no_key_to_one_that_is_gone",
        "gateway webhook secret new": "tests/unit/test_cli_webhooks.py::test_secrets_by_hand",
        "gateway submit --model coder-small -f prompt.md --wait": (
            "tests/unit/test_cli_jobs.py::test_hand_in_look_and_fetch"
        ),
        "gateway status": "tests/conformance/test_status.py::test_the_table_of_the_specification",
        "gateway usage --since 7d": "tests/conformance/test_usage.py::test_usage_is_what_the_clients_counted",
        "gateway inspect lanes": f"{INSPECTED}::test_every_command_that_is_sent_reads",
        "gateway logs ID": "tests/unit/test_job_log.py::test_files_can_be_named_and_redis_may_be_away",
    },
    "docs/ci.md": {
        "gateway submit --model coder-small -f prompt.md": "tests/unit/test_cli_jobs.py::test_hand_in_look_and_fetch",
        "gateway batch run requests.jsonl -o out.jsonl --concurrency 32": (
            "tests/conformance/test_ci_examples.py::test_the_gitlab_step_summarises_every_page"
        ),
        "git diff main... | GATEWAY_URL=http://gpu-box.example.org:8400 python docs/examples/bot.py": (
            "tests/conformance/test_ci_examples.py::test_the_bot_prints_a_review_and_comes_back_to_it"
        ),
        "WEBHOOK_SECRET=whsec_… python docs/examples/webhook_receiver.py 9000": (
            "tests/conformance/test_webhook_example.py::test_the_receiver_believes_the_gateway"
        ),
        'eval "$(gateway completion bash)"': (
            "tests/unit/test_cli_completion.py::test_bash_completes_commands_options_and_names"
        ),
    },
    "docs/concepts.md": {
        "python -m broker.pictures lanes policy.yaml": (
            "tests/unit/test_pictures.py::test_anybody_may_print_the_picture_of_their_file"
        ),
    },
    "docs/inspect.md": {
        "gateway inspect lanes": f"{INSPECTED}::test_every_command_that_is_sent_reads",
        "ACL SETUSER looker on >SECRET ~gw:* +@read -keys": (
            f"{INSPECTED}::test_a_user_who_may_only_read_can_run_all_of_it"
        ),
        "AT (UTC)": SHOWN,
        "gateway logs ID": "tests/unit/test_job_log.py::test_files_can_be_named_and_redis_may_be_away",
        "redis-cli XLEN gw:lane:deep-coder": f"{RECIPES}::",
        "ACL SETUSER insight on >SECRET ~gw:* +@read -keys +info +ping +client|setname +client|setinfo +command "
        "+module|list +select": f"{RECIPES}::test_redis_insight_may_look_and_nothing_else",
        "redis_exporter --redis.addr=redis://127.0.0.1:6379 \\": (
            f"{RECIPES}::test_the_exporter_would_read_what_status_tells"
        ),
        "apiVersion: keda.sh/v1alpha1": f"{RECIPES}::test_keda_would_count_waiting_and_running_jobs",
    },
    "docs/jobs.md": {
        "curl -s http://127.0.0.1:8400/v1/jobs -H 'content-type: application/json' "
        "-H 'Idempotency-Key: pr-7-review' -d '{": (
            "tests/conformance/test_jobs_page.py::test_the_job_of_the_page_is_taken_once"
        ),
        "gateway dead list": "tests/unit/test_cli_dead.py::test_from_nothing_to_a_letter_and_back",
    },
    "docs/metrics.md": {"scrape_configs:": "tests/unit/test_blocks.py::test_prometheus_is_told_what_alerts_ask_for"},
    "docs/policy.md": {
        "# yaml-language-server: $schema=policy.schema.json": (
            "tests/unit/test_docs.py::test_the_reference_begins_with_the_file_that_readme_shows"
        ),
    },
    "docs/security.md": {".ci/audit": "tests/unit/test_blocks.py::test_the_audit_is_a_script_that_bash_reads"},
    "docs/traces.md": {
        "OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:4318 gateway up": (
            "tests/conformance/test_traces.py::test_one_trace_from_the_client_through_every_part"
        )
    },
    "docs/troubleshooting.md": {
        "gateway status": "tests/conformance/test_jobs_page.py::test_what_troubleshooting_looks_at_first"
    },
}
"""By page and first line: the test that runs what stands there."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_block_that_no_test_knows_fails(page: Path) -> None:
    name = str(page.relative_to(ROOT))
    there = {block.known_as.split("  ")[0].strip() for block in blocks(page) if not block.name}
    if any(block.name for block in blocks(page)):
        assert name in NAMED, f"{name} has named blocks, which no test takes out"
    assert there == KNOWN.get(name, {}).keys(), "say in KNOWN which test runs it"


@pytest.mark.parametrize(
    "test", sorted({*NAMED.values(), *(t for of in KNOWN.values() for t in of.values())} - {SHOWN})
)
def test_the_tests_that_are_named_exist(test: str) -> None:
    path, _, name = test.partition("::")
    assert f"def {name}" in (ROOT / path).read_text()


def test_pieces_of_a_policy_are_taken() -> None:
    """Each behind the file that README begins with."""
    first, *pieces = [block.text for block in blocks(ROOT / "README.md") if block.language == "yaml"]
    assert len(pieces) == 2
    for piece in pieces:
        assert Policy.parse(first + piece).models


def test_prometheus_is_told_what_alerts_ask_for() -> None:
    [text] = [block.text for block in blocks(ROOT / "docs" / "metrics.md") if block.language == "yaml"]
    told = yaml.safe_load(text)
    [job], [rules] = told["scrape_configs"], told["rule_files"]
    alerts = (ROOT / "docs" / "monitoring" / rules).read_text()
    assert set(re.findall(r'job="(\w+)"', alerts)) == {job["job_name"]}
    assert job["static_configs"][0]["targets"] == ["127.0.0.1:8400"] and "metrics_path" not in job


def test_the_audit_is_a_script_that_bash_reads() -> None:
    """It asks the net about packages, so nothing here runs it."""
    script = ROOT / ".ci" / "audit"
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", str(script)], timeout=20).returncode == 0
