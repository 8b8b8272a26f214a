// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* A uprobe that may sleep: libbpf sets BPF_F_SLEEPABLE. */
#include "counts.bpf.h"

COUNTS(1);

SEC("uprobe.multi.s")
int on_call_sleep(void *ctx)
{
	count(0);
	return 0;
}
