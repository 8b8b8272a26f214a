// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* An XDP program for packets in several fragments: libbpf sets BPF_F_XDP_HAS_FRAGS. */
#include "counts.bpf.h"

COUNTS(1);

SEC("xdp.frags")
int pass_frags(struct xdp_md *ctx)
{
	count(0);
	return XDP_PASS;
}
