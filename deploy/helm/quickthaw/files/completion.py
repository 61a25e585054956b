"""Ask the URL of argv[1] for one token of the model argv[2], or of the one that /v1/models names. Fails with the answer's body."""

import json
import sys
import urllib.error
import urllib.request


def call(path, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(sys.argv[1] + path, data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        sys.exit(f"{path}: {error.code} {error.read().decode(errors='replace')}")


model = sys.argv[2] if sys.argv[2:] else call("/v1/models")["data"][0]["id"]
answer = call("/v1/completions", {"model": model, "prompt": "The quick brown fox", "max_tokens": 1, "temperature": 0})
print(f"{model}: {answer['choices'][0]['text']!r}")
