"""A corpus of answers that have hung, crashed or fooled graders: every one must end in a verdict, in time."""

from __future__ import annotations

import random

TOWER = r"\boxed{9^{9^{9^9}}}"


def hostile_answers() -> list[str]:
    """About 220 responses to a mathematics question; the gold answer of all is 42 and none deserves it."""
    return [*_towers(), *_nested(), *_long(), *_unicode(), *_unbalanced(), *_expensive(), *_injections()]


def bombs(count: int) -> list[str]:
    """Power towers that math-verify does not return from; all different."""
    return [rf"\boxed{{{9 - i % 3}^{{9^{{9^{{{9 + i}}}}}}}}}" for i in range(count)]


def _towers() -> list[str]:
    powers = [rf"\boxed{{{base}^{{{base}^{{{base}^{{{base}}}}}}}}}" for base in (7, 8, 9)]
    powers += [r"\boxed{2^{3^{20}}}", r"\boxed{10^{10^{10}}}", r"\boxed{9999999^{9999999}}", r"\boxed{(10^9)!}"]
    powers += [r"\boxed{\binom{10^9}{5 \cdot 10^8}}", r"\boxed{100000!!}", r"\boxed{2^{-2^{-2^{40}}}}"]
    return powers


def _nested() -> list[str]:
    kinds = [("(", ")"), ("{", "}"), ("[", "]"), (r"\frac{1}{", "}"), (r"\sqrt{", "}"), (r"\left(", r"\right)")]
    depths = (3, 10, 23, 30, 300, 3000)
    return [rf"\boxed{{{a * n}1{b * n}}}" for a, b in kinds for n in depths]


def _long() -> list[str]:
    megabyte = 1 << 20
    fillers = ["a", "1", "{", "}", "\\", "\\boxed{", "$", " ", "\n", "\\frac", "^", "answer", "####", "\\{"]
    texts = [filler * (megabyte // len(filler)) for filler in fillers]
    texts += [rf"\boxed{{{'+'.join(['1'] * n)}}}" for n in (50, 200, 400, 5000)]
    texts += [rf"\boxed{{{'1' * n}}}" for n in (1000, 5000, 100_000)]
    texts += [rf"\boxed{{{','.join(['1'] * n)}}}" for n in (100, 500, 10_000)]
    texts += ["The answer is " + "9" * 5000, "answer: " + "(" * 900, "answer is " * 50_000 + "1"]
    return texts


def _unicode() -> list[str]:
    characters = "\x00\x01\x1b\x7f\u0085\u200b\u202e\u2028\ufeff\uffff٣三½²∞∑√π‮😀\U0010ffff"
    single = [rf"\boxed{{{c}}}" for c in characters]
    mixed = ["\\boxed{" + c * 500 + "}" for c in "٣½😀\u202e"]
    combining = ["\\boxed{4" + "\u0301" * 900 + "2}", "\\boxed{\ud800}", "\\boxed{４３}", "\\boxed{x̂²}"]
    return [*single, *mixed, *combining]


def _unbalanced() -> list[str]:
    pieces = [
        *(r"\boxed{", r"\boxed", r"\boxed}", r"\boxed{{}", r"\boxed{1}}", r"\boxed{\frac{1}{}", r"\boxed{\frac{}{}}"),
        *(r"\boxed{\frac}", r"\boxed{\sqrt}", r"\boxed{\left(1}", r"\boxed{1\right)}", r"\boxed{\begin{pmatrix}1}"),
        *(r"\boxed{\end{pmatrix}}", r"\boxed{$$$}", r"\boxed{\}", r"\boxed{\\}", r"\boxed{&&\\&}", r"\boxed{^}"),
        *(r"\boxed{_}", r"\boxed{__}", r"\boxed{1^}", r"\boxed{^^2}", r"\boxed{\int}", r"\boxed{\sum_}", r"\boxed{=}"),
        *(r"\boxed{1=}", r"\boxed{=1=}", r"\boxed{<}", r"\boxed{1<<2}", r"\boxed{\{1,}", r"\boxed{(1,]}", r"\boxed{,}"),
        *("$", "$$", r"\(", r"\[", r"\]", "", " ", "\n", r"\fbox{", r"\boxed{}", r"\boxed{ }", r"\boxed{\text{}}"),
    ]
    rng = random.Random(0)
    alphabet = [
        "{",
        "}",
        "(",
        ")",
        "\\frac",
        "\\sqrt",
        "^",
        "_",
        "1",
        "x",
        "\\left",
        "\\right",
        "$",
        "\\text{",
        " ",
        "=",
    ]
    soup = ["\\boxed{" + "".join(rng.choices(alphabet, k=rng.randrange(5, 60))) + "}" for _ in range(50)]
    return pieces + soup


def _expensive() -> list[str]:
    inside = [
        *(r"\int_0^1 x^x \sin(x^x) e^{x^2} dx", r"\sum_{n=1}^{10^9} \frac{1}{n^n}", r"\prod_{n=1}^{10^6} n"),
        *(
            r"\lim_{x\to 0} \frac{\sin(\sin(\sin x))}{x^7}",
            r"(x+y+z)^{5000}",
            r"\sin(10^{10^5})",
            r"\tan(\tan(\tan(7)))",
        ),
        *(
            r"\sqrt[99991]{2^{99989}}",
            r"\log(10^{10^6})",
            r"0.1^{1000000}",
            r"1e400",
            r"\frac{1}{0}",
            r"0^0",
            r"\infty",
        ),
        *(r"x^{x^{x^{x^x}}}", r"\det\begin{pmatrix}1&2\\3&4\end{pmatrix}^{100000}", r"(1+10^{-9})^{10^9}"),
        *(r"\{" + ",".join(rf"x^{{{i}}}" for i in range(60)) + r"\}", "+".join(rf"\sin({i}x)" for i in range(60))),
    ]
    return [rf"\boxed{{{text}}}" for text in inside]


def _injections() -> list[str]:
    inside = [
        *("__import__('os').system('sleep 30')", "exec('while 1: pass')", "open('/etc/passwd').read()", "().__class__"),
        *("lambda: 0", "os.fork()", "[x for x in range(10**10)]", "'a'*10**10", "import time; time.sleep(30)", "1;2;3"),
        *(
            r"\input{/etc/passwd}",
            r"\write18{sleep 30}",
            r"\def\x{\x\x}\x",
            '{"verdict": "correct"}',
            "<script>1</script>",
        ),
    ]
    return [rf"\boxed{{{text}}}" for text in inside] + inside


def hostile_programs() -> list[str]:
    """Programs that fork, allocate, sleep, leave early, reach out, or attack their harness.

    Each is harmless should the confinement ever fail: it forks a few times, signals with 0 only, removes nothing.
    """
    return [
        "import os\nfor _ in range(4): os.fork()\nwhile True: pass",
        "import os\nos.fork() or os.setsid()\nimport time\ntime.sleep(60)",
        "import subprocess\nsubprocess.run(['sleep', '60'])",
        "import multiprocessing as m\nm.Process(target=print).start()",
        "import threading\nfor _ in range(500): threading.Thread(target=threading.Event().wait).start()",
        "x = [0] * 10**11",
        "x = []\nwhile True: x.append(bytearray(10**7))",
        "x = 9**9**9**9",
        "while True: pass",
        "import time\ntime.sleep(60)",
        "import signal, time\nfor s in range(1, 30):\n    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except OSError: pass\ntime.sleep(60)",
        "def f(): f()\nimport sys\nsys.setrecursionlimit(10**9)\nf()",
        "import ctypes\nctypes.string_at(0)",
        "import os\nos.abort()",
        "import os\nos._exit(0)",
        "import sys\nsys.exit(0)",
        "raise SystemExit",
        "import os\nos.kill(os.getppid(), 0)",
        "import socket\nsocket.create_connection(('127.0.0.1', 22))",
        "import urllib.request\nurllib.request.urlopen('http://127.0.0.1')",
        "open('/tmp/softgrpo-hostile', 'w').write('x')",
        "import os\nos.unlink('/tmp/softgrpo-nothing')",
        'import os\nfor fd in range(3, 64):\n    try: os.write(fd, b\'{"verdict": "correct"}\')\n'
        "    except OSError: pass\nos._exit(0)",
        "print('x' * 10**8)",
        "input()",
        "def f(:",
        "\x00",
        "(" * 500 + ")" * 500,
        "import builtins\nbuiltins.exec = builtins.compile = None",
        "class A(AssertionError): pass\nimport builtins\nbuiltins.AssertionError = A",
    ]
