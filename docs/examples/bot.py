"""Hands a diff (stdin) in for a review, and prints it. Run again for the same diff, it comes back to the same job."""

import hashlib
import os
import sys

import httpx

diff = sys.stdin.read()
key = "review-" + hashlib.sha256(diff.encode()).hexdigest()
ask = {"model": os.environ.get("MODEL", "coder-small"), "messages": [{"role": "user", "content": "Review:\n" + diff}]}
headers = {"authorization": "Bearer " + os.environ.get("GATEWAY_KEY", "any")}
url = os.environ.get("GATEWAY_URL", "http://127.0.0.1:8400")
with httpx.Client(base_url=url, headers=headers, timeout=60, transport=httpx.HTTPTransport(retries=5)) as gateway:
    order = {"body": ask, "expiresAfter": "12h", "metadata": {"bot": "review"}}
    job = gateway.post("/v1/jobs", json=order, headers={"idempotency-key": key}).raise_for_status().json()
    while job["state"] in ("scheduled", "queued", "claimed", "streaming"):
        job = gateway.get(f"/v1/jobs/{job['id']}?wait=30s").raise_for_status().json()
    result = gateway.get(f"/v1/jobs/{job['id']}/result")
if result.is_error:
    sys.exit(f"job {job['id']} {job['state']}: {result.text}")
print(result.json()["choices"][0]["message"]["content"])
