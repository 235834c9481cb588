// Copyright The nhybrid Authors.
// SPDX-License-Identifier: Apache-2.0

import java.net.URI;
import java.net.http.HttpRequest;
import java.security.MessageDigest;
import java.util.ArrayList;
import java.util.List;
import java.util.regex.Pattern;

public class Hello {
    public static void main(String[] args) throws Exception {
        List<String> words = new ArrayList<>(List.of("hello", "from", "java"));
        HttpRequest request = HttpRequest.newBuilder(URI.create("http://localhost/")).build();
        byte[] sum = MessageDigest.getInstance("SHA-256").digest(request.uri().toString().getBytes());
        if (!Pattern.matches("[0-9]+", Integer.toString(sum.length))) {
            throw new IllegalStateException();
        }
        System.out.println(String.join(" ", words));
    }
}
