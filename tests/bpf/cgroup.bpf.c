// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* Packets of a cgroup in both directions. counts[0]: received, counts[1]: sent. */
#include "counts.bpf.h"

#define ALLOW 1

COUNTS(2);

SEC("cgroup_skb/ingress")
int on_ingress(struct __sk_buff *skb)
{
	count(0);
	return ALLOW;
}

SEC("cgroup_skb/egress")
int on_egress(struct __sk_buff *skb)
{
	count(1);
	return ALLOW;
}
