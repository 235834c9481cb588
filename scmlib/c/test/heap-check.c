/* Copyright The nhybrid Authors. */
/* SPDX-License-Identifier: Apache-2.0 */

/* Runs with libscm_preload and knows nothing of it: the malloc family from many threads, and forks amid them. */
#include <errno.h>
#include <malloc.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define CHECK(cond)                                                              \
	do {                                                                     \
		if (!(cond)) {                                                   \
			printf("failed: %s:%d: %s\n", __FILE__, __LINE__, #cond); \
			fflush(stdout);                                          \
			_exit(4);                                                \
		}                                                                \
	} while (0)

struct block {
	uint8_t *p;
	size_t n;
	uint8_t fill;
};

static void check(const struct block *b)
{
	for (size_t i = 0; i < b->n; i += b->n > 4096 ? 509 : 1)
		CHECK(b->p[i] == b->fill);
}

static void fill(struct block *b, uint8_t *p, size_t n, uint8_t f)
{
	*b = (struct block){p, n, f};
	memset(p, f, n);
}

#define SLOTS 300
static struct block exchange[64];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void *worker(void *arg)
{
	unsigned seed = (unsigned)(uintptr_t)arg;
	struct block b[SLOTS] = {{0}};
	for (int n = 0; n < 60000; n++) {
		struct block *s = &b[rand_r(&seed) % SLOTS];
		size_t size = (size_t)rand_r(&seed) % (n % 100 == 0 ? 300000u : n % 10 == 0 ? 9000u : 300u) + 1;
		uint8_t f = (uint8_t)rand_r(&seed);
		void *p;
		if (s->p) {
			check(s);
			switch (rand_r(&seed) % 4) {
			case 0: /* grown or shrunk: what both have in common stays */
				p = realloc(s->p, size);
				CHECK(p);
				s->p = p;
				s->n = s->n < size ? s->n : size;
				check(s);
				fill(s, p, size, f);
				continue;
			case 1: { /* freed by another thread */
				pthread_mutex_lock(&lock);
				struct block *x = &exchange[rand_r(&seed) % 64], was = *x;
				*x = *s;
				*s = was;
				pthread_mutex_unlock(&lock);
				if (s->p)
					check(s);
				continue;
			}
			default:
				free(s->p);
				s->p = NULL;
			}
			continue;
		}
		if (n % 5 == 0) {
			uint8_t *z = calloc(size, 1);
			CHECK(z);
			for (size_t i = 0; i < size; i++)
				CHECK(z[i] == 0);
			fill(s, z, size, f);
		} else if (n % 7 == 0) {
			size_t align = (size_t)8 << rand_r(&seed) % 12;
			CHECK(!posix_memalign(&p, align, size) && (uintptr_t)p % align == 0 && malloc_usable_size(p) >= size);
			fill(s, p, size, f);
		} else {
			p = malloc(size);
			CHECK(p && (uintptr_t)p % 16 == 0 && malloc_usable_size(p) >= size);
			fill(s, p, size, f);
		}
	}
	for (int i = 0; i < SLOTS; i++) {
		if (b[i].p)
			check(&b[i]);
		free(b[i].p);
	}
	return NULL;
}

int main(int argc, char **argv)
{
	if (argc > 1 && !strcmp(argv[1], "bench")) { /* pairs of malloc and free, some at a time */
		static void *p[1000];
		unsigned seed = 1;
		for (int n = 0; n < 20000000 / 1000; n++) {
			for (int i = 0; i < 1000; i++)
				p[i] = malloc((size_t)(rand_r(&seed) % 500 + 1));
			for (int i = 0; i < 1000; i++)
				free(p[i]);
		}
		return 0;
	}
	/* what a parent keeps while its children do what they like to their own heap */
	struct block keep[200];
	for (int i = 0; i < 200; i++)
		fill(&keep[i], malloc(1000u * (unsigned)(i % 40) + 1), 1000u * (unsigned)(i % 40) + 1, (uint8_t)i);
	pthread_t th[4];
	for (uintptr_t i = 0; i < 4; i++)
		CHECK(!pthread_create(&th[i], NULL, worker, (void *)(i + 1)));
	int denied = 0;
	for (int n = 0; n < 8; n++) {
		pid_t pid = fork();
		if (pid < 0) {
			CHECK(errno == ENOMEM);
			denied++;
			continue;
		}
		if (pid == 0) {
			for (int i = 0; i < 200; i++) {
				check(&keep[i]);
				memset(keep[i].p, 0xdd, keep[i].n);
				free(keep[i].p);
				void *p = malloc(keep[i].n);
				CHECK(p);
				memset(p, 0xcc, keep[i].n);
			}
			if (fork() == 0)
				_exit(malloc(1 << 20) ? 0 : 1);
			int status;
			CHECK(wait(&status) > 0 && status == 0);
			_exit(0);
		}
		for (int i = 0; i < 200; i++)
			check(&keep[i]);
		int status;
		CHECK(waitpid(pid, &status, 0) == pid);
		CHECK(status == 0);
	}
	for (int i = 0; i < 4; i++)
		pthread_join(th[i], NULL);
	for (int i = 0; i < 200; i++) {
		check(&keep[i]);
		free(keep[i].p);
	}
	/* limits */
	volatile size_t huge = SIZE_MAX - 100; /* the compiler would object */
	CHECK(malloc(huge) == NULL && errno == ENOMEM && calloc(huge, 3) == NULL && reallocarray(NULL, huge, 3) == NULL);
	void *p = malloc(0), *q = &p;
	CHECK(p);
	free(p);
	free(NULL);
	CHECK(posix_memalign(&q, 3, 10) == EINVAL && q == &p);
	/* full: NULL, and all of it again after it was freed */
	size_t got = 0, again = 0;
	for (int round = 0; round < 2; round++) {
		static void *big[1 << 14];
		int n = 0;
		while (n < 1 << 14 && (big[n] = malloc(1 << 20)))
			n++;
		*(round ? &again : &got) = (size_t)n;
		while (n > 0)
			free(big[--n]);
	}
	CHECK(got >= 1 && got == again);
	printf("ok denied %d megabytes %zu\n", denied, got);
	return 0;
}
