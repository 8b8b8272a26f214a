// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
/* tcx in both directions. counts[0]: received, counts[1]: sent. */
#include "counts.bpf.h"

#define NEXT (-1) /* TCX_NEXT: let the next program decide; not in headers before Linux 6.6 */

COUNTS(2);

SEC("tcx/ingress")
int on_ingress(struct __sk_buff *skb)
{
	count(0);
	return NEXT;
}

SEC("tcx/egress")
int on_egress(struct __sk_buff *skb)
{
	count(1);
	return NEXT;
}
