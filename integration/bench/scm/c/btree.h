/* Copyright The nhybrid Authors. */
/* SPDX-License-Identifier: Apache-2.0 */

/*
 * A B-tree as in textbooks (Cormen et al., ch. 18): nodes are split on the way down. The same code for both libraries and, without
 * transactions, for figure 6. ORDER is the number of children; 8, as pmembench's tree has.
 */
#ifndef ORDER
#define ORDER 8
#endif

struct node {
	uint32_t n, leaf;
	uint64_t keys[ORDER - 1], vals[ORDER - 1];
	uint64_t kids[ORDER];
};

struct tree {
	uint64_t root;
	uint64_t spare, end; /* where nodes come from if there are no transactions */
};

#define ALWAYS static inline __attribute__((always_inline))

/* What is about to change: the whole node, of a leaf without the children that it does not have. */
ALWAYS int touch(uint64_t ref, bool txs)
{
	const struct node *x = at(ref);
	return txs ? tx_add(ref, x->leaf ? offsetof(struct node, kids) : sizeof(*x)) : 0;
}

ALWAYS int new_node(struct tree *t, uint64_t *ref, bool leaf, bool txs)
{
	if (txs) {
		int rc = tx_alloc(sizeof(struct node), ref);
		if (rc)
			return rc;
	} else {
		if (t->end - t->spare < sizeof(struct node))
			return -1;
		*ref = t->spare;
		t->spare += sizeof(struct node);
	}
	struct node *x = at(*ref);
	x->n = 0, x->leaf = leaf;
	return 0;
}

/* The i-th child of x, which is full, becomes two. x has been touched. */
ALWAYS int split(struct tree *t, uint64_t xref, uint32_t i, bool txs)
{
	enum { HALF = (ORDER - 1) / 2 };
	struct node *x = at(xref), *l = at(x->kids[i]), *r;
	uint64_t rref;
	int rc = new_node(t, &rref, l->leaf, txs);
	if (!rc)
		rc = touch(x->kids[i], txs);
	if (rc)
		return rc;
	r = at(rref);
	r->n = ORDER - 1 - HALF - 1;
	memcpy(r->keys, l->keys + HALF + 1, r->n * 8);
	memcpy(r->vals, l->vals + HALF + 1, r->n * 8);
	if (!l->leaf)
		memcpy(r->kids, l->kids + HALF + 1, (r->n + 1) * 8);
	l->n = HALF;
	memmove(x->kids + i + 2, x->kids + i + 1, (x->n - i) * 8);
	memmove(x->keys + i + 1, x->keys + i, (x->n - i) * 8);
	memmove(x->vals + i + 1, x->vals + i, (x->n - i) * 8);
	x->kids[i + 1] = rref, x->keys[i] = l->keys[HALF], x->vals[i] = l->vals[HALF];
	x->n++;
	return 0;
}

ALWAYS uint32_t find(const struct node *x, uint64_t k)
{
	uint32_t i = 0;
	while (i < x->n && x->keys[i] < k)
		i++;
	return i;
}

/* Nodes that this insert has touched are not touched again: none is changed twice but a parent, which its split has touched. */
ALWAYS int insert(uint64_t tref, uint64_t k, uint64_t v, bool txs)
{
	struct tree *t = at(tref);
	uint64_t ref = t->root, touched = 0;
	int rc = 0;
	if (!ref || ((struct node *)at(ref))->n == ORDER - 1) {
		uint64_t root;
		if (txs)
			rc = tx_add(tref, sizeof(*t));
		if (!rc)
			rc = new_node(t, &root, !ref, txs);
		if (rc)
			return rc;
		struct node *x = at(root);
		t->root = root, touched = root;
		if (ref) {
			x->kids[0] = ref;
			rc = split(t, root, 0, txs);
		}
		ref = root;
	}
	while (!rc) {
		struct node *x = at(ref);
		uint32_t i = find(x, k);
		if (i < x->n && x->keys[i] == k) {
			rc = touch(ref, txs);
			if (!rc)
				x->vals[i] = v;
			return rc;
		}
		if (x->leaf) {
			if (ref != touched)
				rc = touch(ref, txs);
			if (rc)
				break;
			memmove(x->keys + i + 1, x->keys + i, (x->n - i) * 8);
			memmove(x->vals + i + 1, x->vals + i, (x->n - i) * 8);
			x->keys[i] = k, x->vals[i] = v;
			x->n++;
			return 0;
		}
		if (((struct node *)at(x->kids[i]))->n == ORDER - 1) {
			if (ref != touched)
				rc = touch(ref, txs);
			if (!rc)
				rc = split(t, ref, i, txs);
			if (rc)
				break;
			if (x->keys[i] < k)
				i++;
			touched = x->kids[i]; /* one of the two halves: both are in the transaction */
		}
		ref = x->kids[i];
	}
	return rc;
}
